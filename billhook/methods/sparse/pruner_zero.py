"""Pruner-Zero: the score that a search over formulas found, the squared weight times the gradient's rank of size.

Dong et al. 2024, "Pruner-Zero: Evolving Symbolic Pruning Metric from Scratch for Large Language Models",
arXiv:2406.02924: score W_ij^2 * mms(|G_ij|), where mms maps linearly to [0, 1] over the layer and G is the gradient of
the dense model's loss; its l2 norm over the calibration sequences here. The weights of one row compete. Kept weights
are not updated.
"""

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Dong et al. 2024, arXiv:2406.02924", needs=("gradient_l2",), group="row")
def pruner_zero(W: Tensor, stats: LayerStats, select: Select) -> Tensor:
    """Return W [out, in] with zeros at the smallest W^2 * mms(|G|); reads stats.gradient [out, in]. Equal gradients
    count as one."""
    assert stats.gradient is not None
    low, high = stats.gradient.aminmax()
    share = (stats.gradient - low) / (high - low) if high > low else stats.gradient.new_ones(())
    return W.masked_fill(~select(W.square() * share), 0)
