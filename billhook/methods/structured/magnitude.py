"""Magnitude of parts: keep the parts whose columns have the largest norm.

    score_p = sum over columns j of part p, rows i of w_ij²

Reads no statistics. A baseline: it ignores how large the inputs are, and makes up for nothing.
"""

from torch import Tensor

from billhook.methods.statistics import LayerStats
from billhook.methods.structured.support import largest, masked
from billhook.registry import method


@method(paper="Han et al. 2015, arXiv:1506.02626, summed over parts")
def magnitude(W: Tensor, stats: LayerStats, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The parts to keep, bool [parts], and W [out, in] without the others."""
    keep = largest(W.square().sum(0)[groups].sum(1), count)
    return keep, masked(W, keep, groups)
