"""Magnitude pruning: remove the weights that are smallest in absolute value.

The oldest criterion (Han et al. 2015, "Learning both Weights and Connections", arXiv:1506.02626): score |W_ij|, all
weights of a layer compared with each other. It needs no calibration text and knows nothing about the inputs, which is
why it falls behind at 50 % and more.
"""

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Han et al. 2015, arXiv:1506.02626", needs=(), group="layer")
def magnitude(W: Tensor, stats: LayerStats, select: Select) -> Tensor:
    """Return W [out, in] with zeros at the smallest |W_ij|."""
    return W.masked_fill(~select(W.abs()), 0)
