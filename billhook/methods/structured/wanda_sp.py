"""Wanda-sp: Wanda's score summed over the columns of a part.

An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, arXiv:2312.11983, uses
this extension of Wanda (Sun et al., arXiv:2306.11695) as its baseline.

    score_p = sum over columns j of part p, rows i of |w_ij| · ||X_j||_2

With `least_squares`, the columns that stay are refitted to the outputs of all columns, as by `obs`; without, they keep
their values, as published.
"""

from torch import Tensor

from billhook.methods.statistics import LayerStats
from billhook.methods.structured.support import columns, damped, largest, masked, refit
from billhook.registry import method


def _needs(least_squares: bool, damping: float) -> tuple[str, ...]:
    return ("input_norm", "gram") if least_squares else ("input_norm",)


@method(paper="An et al. 2024, arXiv:2312.11983; Sun et al. 2024, arXiv:2306.11695", needs=_needs)
def wanda_sp(
    W: Tensor, stats: LayerStats, groups: Tensor, count: int, *, least_squares: bool = False, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The parts to keep, bool [parts], and W [out, in] without the others; reads stats.input_norm [in].

    With `least_squares` it reads stats.gram [in, in]; `damping` is a fraction of the mean of its diagonal.
    """
    assert stats.input_norm is not None
    keep = largest((W.abs().sum(0) * stats.input_norm)[groups].sum(1), count)
    if not least_squares:
        return keep, masked(W, keep, groups)
    assert stats.gram is not None
    return keep, refit(W, damped(stats.gram, damping), columns(keep, groups, W.shape[1]))
