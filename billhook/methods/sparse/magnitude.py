"""Magnitude: remove the weights that are smallest in absolute value.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015, arXiv:1506.02626. All weights
of a layer are compared with each other.

    score_ij = |W_ij|

It needs no calibration text. Kept weights are not updated.

Measured agreement: 15 of 16 runs have the published masks in every weight; in the other one, 7 weights differ because a
layer sparsity lies within rounding of a whole count.

Limits: it does not know which inputs are large, and falls behind at 50 % and above.
"""

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Han et al. 2015, arXiv:1506.02626", needs=(), group="layer")
def magnitude(W: Tensor, stats: LayerStats, select: Select) -> Tensor:
    """Return W [out, in] with zeros at the smallest scores."""
    return W.masked_fill(~select(W.abs()), 0)
