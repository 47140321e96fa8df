"""GBLM: Wanda's score plus a term for the gradients of the dense model (GBLM-Pruner).

Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models", 2023, arXiv:2311.04902. The
weights of one output row are compared with each other.

    score_ij = |W_ij| · ‖X_j‖₂ + scale · |W_ij| · ‖G_ij‖_p

G_ij are the gradients of the language modelling loss (mean over a window's tokens) of each calibration window by
itself. For p = 1 (`norm=l1`) their absolute values are summed over windows, for p = 2 the norm is the root of the sum
of their squares. Gradients are those of the dense model, computed block by block and equal to those of one backward
pass bit for bit in float32; input norms are those of the pruned prefix. Kept weights are not updated.

Differences from the published code, which `--published` (`mode=reference`) reproduces:

* Both norms are sums over all windows. The published code divides ‖X_j‖₂ by √N for N windows but not the gradients, so
  that `scale` has √N times the weight (1131 instead of 100 for 128 windows).
* Gradient sums are float32. The published l1 sum is rounded to float16 after every window.
* The product of weight and gradient is float32, in both modes. There it is float16 for a float16 model.
* Gradients of float16 models are scaled by a power of two, so that small ones do not underflow. The published factor of
  100 comes after the backward pass and does not prevent that.
* Memory: the gradients and sums of one block. The published code holds all gradients and two accumulators, about 6
  bytes per weight.

Measured agreement (`mode=reference`, eager attention): 22 of 24 runs have equal masks. In each of the other two (66 and
18 weights differ), one pair of weights with nearly equal scores is ranked the other way, and later blocks see other
inputs.

Limits: gradients are taken once, from the dense model. An auxiliary loss of routers is left out.
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
    """Return W [out, in] with zeros at the smallest scores; reads stats.input_norm [in] and stats.gradient [out, in].

    `norm` is the norm of the gradients over windows, `scale` the weight of their term. `mode="paper"` is the formula
    above; `reference` is the published code.
    """
    if not 0 <= scale < math.inf:
        raise BillhookError(f"gblm: scale must be 0 or more and finite, got {scale:g}.")
    assert stats.input_norm is not None
    assert stats.gradient is not None
    size = W.abs()
    if mode == "paper":
        score = size * (stats.input_norm * math.sqrt(stats.sequences) + scale * stats.gradient)
    else:
        # this statistic includes the published factor of 100
        score = size * stats.input_norm + size * stats.gradient * (scale / 100)
    return W.masked_fill(~select(score), 0)
