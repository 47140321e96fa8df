"""Wanda++: Wanda's score plus the gradients of the block's own outputs.

Yang et al. 2025, "Wanda++: Pruning Large Language Models via Regional Gradients", arXiv:2503.04992:
score |W_ij| * (alpha * G_ij + ||X_j||_2), compared within each output row, where G is the root mean square over
calibration sequences of the gradient of ||block(X)||_2. Kept weights are not updated; the paper's regional optimization
is `--refine blocks`.

Differences from the published code: gradients are those of the dense model's blocks, taken once; input norms are those
of the pruned prefix. ||X_j||_2 is the root mean square over sequences, as G is, so that the number of sequences does
not shift the balance.
"""

import math

from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Yang et al. 2025, arXiv:2503.04992", needs=("input_norm", "gradient_regional"), group="row")
def wandapp(W: Tensor, stats: LayerStats, select: Select, *, alpha: float = 100.0) -> Tensor:
    """Return W [out, in] with zeros at the smallest |W_ij| * (alpha * G_ij + ||X_j||_2); reads stats.input_norm and
    stats.gradient."""
    if not 0 <= alpha < math.inf:
        raise BillhookError(f"wandapp: alpha must be 0 or more and finite, got {alpha:g}.")
    assert stats.input_norm is not None
    assert stats.gradient is not None
    return W.masked_fill(~select(W.abs() * (alpha * stats.gradient + stats.input_norm)), 0)
