"""Taylor: keep the parts whose removal changes the training loss most, to first order.

Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, arXiv:2305.11627: the
element-wise first-order importance, summed over a part:

    score_p = sum over columns j of part p, rows i of |w_ij| · sum over sequences of |g_ij|

The published code sums the gradients of a batch before it takes the absolute value, so that sequences which pull in
opposite directions cancel; here they do not. It also adds the importance of the producers' rows; here the consumer's
columns decide. Weights that stay keep their values.
"""

from torch import Tensor

from billhook.methods.statistics import LayerStats
from billhook.methods.structured.support import largest, masked
from billhook.registry import method


@method(paper="Ma et al. 2023, arXiv:2305.11627", needs=("gradient_l1",))
def taylor(W: Tensor, stats: LayerStats, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The parts to keep, bool [parts], and W [out, in] without the others; reads stats.gradient [out, in]."""
    assert stats.gradient is not None
    keep = largest((W.abs() * stats.gradient).sum(0)[groups].sum(1), count)
    return keep, masked(W, keep, groups)
