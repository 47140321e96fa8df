"""GBLM-Pruner: Wanda's score plus the gradients of the dense model.

Das et al. 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", arXiv:2311.04902: score
|W_ij| * ||X_j||_2 + scale * |W_ij| * ||G_ij||_p, compared within each output row, where G_ij are the gradients of the
losses of the N calibration sequences and p is 1 (the default) or 2. Gradients are those of the dense model, input norms
those of the pruned prefix. Kept weights are not updated.

`mode=paper` is this formula, both norms sums over all calibration text, float32. `mode=reference` is the published
code: it divides
||X_j||_2 by sqrt(N) and not the gradients, so `scale` weighs sqrt(N) times more, and it keeps gradient norms in float16
(the l1 sum is rounded after each sequence). The product of weight and gradient is float32 here, as there for a float32
model; there it is float16 for a float16 model.
"""

import math
from typing import Literal

from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats, gradient_name
from billhook.registry import method


@method(
    paper="Das et al. 2023, arXiv:2311.04902",
    needs=lambda norm, mode, **_: ("input_norm", gradient_name(norm, mode)),
    group="row",
)
def gblm(
    W: Tensor,
    stats: LayerStats,
    select: Select,
    *,
    norm: Literal["l1", "l2"] = "l1",
    scale: float = 100.0,
    mode: Literal["paper", "reference"] = "paper",
) -> Tensor:
    """Return W [out, in] with zeros at the smallest |W_ij| * ||X_j||_2 + scale * |W_ij| * ||G_ij||_p; reads both
    norms."""
    if not 0 <= scale < math.inf:
        raise BillhookError(f"gblm: scale must be 0 or more and finite, got {scale:g}.")
    assert stats.input_norm is not None
    assert stats.gradient is not None
    size = W.abs()
    if mode == "paper":
        score = size * (stats.input_norm * math.sqrt(stats.sequences) + scale * stats.gradient)
    else:
        score = size * stats.input_norm + size * stats.gradient * (
            scale / 100
        )  # this statistic has the published factor 100 inside
    return W.masked_fill(~select(score), 0)
