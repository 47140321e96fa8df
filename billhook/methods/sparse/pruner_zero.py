"""Pruner-Zero: a score found by evolutionary search over formulas, squared weight times scaled gradient.

Dong et al., "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large Language Models", ICML 2024,
arXiv:2406.02924. The weights of one output row are compared with each other.

    score_ij = W_ij² · mms(‖G_ij‖₂),   mms(x) = (x − min x) / (max x − min x) over the layer

G_ij are the gradients of `gblm`, their l2 norm over calibration windows. Kept weights are not updated.

Measured agreement: not compared with published code.

Limits: it does not look at activations.
"""

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Dong et al. 2024, arXiv:2406.02924", needs=("gradient_l2",), group="row")
def pruner_zero(W: Tensor, stats: LayerStats, select: Select) -> Tensor:
    """Return W [out, in] with zeros at the smallest scores; reads stats.gradient [out, in].

    If all gradients are equal, the score is the squared weight.
    """
    assert stats.gradient is not None
    low, high = stats.gradient.aminmax()
    share = (stats.gradient - low) / (high - low) if high > low else stats.gradient.new_ones(())
    return W.masked_fill(~select(W.square() * share), 0)
