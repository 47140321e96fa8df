"""RIA: a weight counts by its share of its row and of its column, so that no input or output is cut off.

Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024:
score (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2 ^ power, all weights of a layer compete. Kept weights
are not updated. The paper's permutation of channels for N:M patterns is not here: it would change the layers before
this one.
"""

import math

from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method


@method(paper="Zhang et al., ICLR 2024", needs=("input_norm",), group="layer")
def ria(W: Tensor, stats: LayerStats, select: Select, *, power: float = 0.5) -> Tensor:
    """Return W [out, in] with zeros at the smallest relative importance times ||X_j||_2 ^ power; reads stats.input_norm
    [in]."""
    if not 0 <= power < math.inf:
        raise BillhookError(f"ria: power must be 0 or more and finite, got {power:g}.")
    assert stats.input_norm is not None
    size = W.abs()
    columns, rows = (size.sum(dim, keepdim=True).clamp_min(1e-30) for dim in (0, 1))
    return W.masked_fill(~select((size / columns + size / rows) * stats.input_norm**power), 0)
