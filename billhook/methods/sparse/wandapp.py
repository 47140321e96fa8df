"""Wanda++: Wanda's score plus a term for the gradients of the block's own outputs.

Yang et al., "Wanda++: Pruning Large Language Models via Regional Gradients", ACL Findings 2025, arXiv:2503.04992. The
weights of one output row are compared with each other.

    score_ij = |W_ij| · (alpha · G_ij + ‖X_j‖₂)

G_ij is the root mean square over calibration windows of the gradient of ‖block(X)‖₂; no gradient passes through the
whole model. ‖X_j‖₂ is a root mean square over windows as well, so that the number of windows does not change the
balance. Kept weights are not updated; the paper's regional optimization is `--refine blocks`.

Differences from the published code: gradients are those of the dense model's blocks and are taken once; input norms are
those of the pruned prefix.

Measured agreement: not compared with published code.
"""

import math

from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Yang et al. 2025, arXiv:2503.04992", needs=("input_norm", "gradient_regional"), group="row")
def wandapp(W: Tensor, stats: LayerStats, select: Select, *, alpha: float = 100.0) -> Tensor:
    """Return W [out, in] with zeros at the smallest scores; reads stats.input_norm [in] and stats.gradient [out, in].

    `alpha` is the weight of the gradient term.
    """
    if not 0 <= alpha < math.inf:
        raise BillhookError(f"wandapp: alpha must be 0 or more and finite, got {alpha:g}.")
    assert stats.input_norm is not None
    assert stats.gradient is not None
    return W.masked_fill(~select(W.abs() * (alpha * stats.gradient + stats.input_norm)), 0)
