"""RIA: magnitude relative to the weight's row and column, times the input norm.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024. All
weights of a layer are compared with each other.

    score_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂ ^ power

Relative magnitudes keep any input or output from being removed altogether. Kept weights are not updated.

Differences from the paper: the permutation of channels for N:M patterns is left out, because it would change the layers
before this one.

Measured agreement: not compared with published code.
"""

import math

from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Zhang et al., ICLR 2024", needs=("input_norm",), group="layer")
def ria(W: Tensor, stats: LayerStats, select: Select, *, power: float = 0.5) -> Tensor:
    """Return W [out, in] with zeros at the smallest scores; reads stats.input_norm [in].

    `power` is the exponent of the input norm.
    """
    if not 0 <= power < math.inf:
        raise BillhookError(f"ria: power must be 0 or more and finite, got {power:g}.")
    assert stats.input_norm is not None
    size = W.abs()
    columns, rows = (size.sum(dim, keepdim=True).clamp_min(1e-30) for dim in (0, 1))
    return W.masked_fill(~select((size / columns + size / rows) * stats.input_norm**power), 0)
