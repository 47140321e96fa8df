"""Wanda: remove the weights with the smallest product of magnitude and input norm.

Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695:
score |W_ij| * ||X_j||_2, compared within each output row. As in the published code the squared norm is divided by the
number of calibration sequences; a common factor does not change a ranking within a layer. Kept weights are not updated.
"""

from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Sun et al. 2023, arXiv:2306.11695", needs=("input_norm",), group="row")
def wanda(W: Tensor, stats: LayerStats, select: Select) -> Tensor:
    """Return W [out, in] with zeros at the smallest |W_ij| * ||X_j||_2; reads stats.input_norm [in]."""
    assert stats.input_norm is not None
    return W.masked_fill(~select(W.abs() * stats.input_norm), 0)
