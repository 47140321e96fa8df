"""Packed weights by the compiled kernels where there are any, by plain torch otherwise; both make the same bytes."""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.runtime import fallback

_ALL = slice(None)


def row_starts(bitmask: Tensor, in_features: int) -> Tensor:
    """Where each row's values begin, int64 [out + 1], from the bitmask, uint8 [out, 8 * ceil(in_features / 64)].

    The last entry is the number of kept weights. Raises BillhookError for a bitmask of another shape or dtype, or with a bit set
    beyond the last column.
    """
    width = fallback.mask_bytes(in_features)
    if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or in_features < 1 or bitmask.shape[1] != width:
        raise BillhookError(
            f"A bitmask of {in_features} columns must be uint8 [rows, {width}], found {bitmask.dtype} {list(bitmask.shape)}. "
            "The packed file is damaged; pack the model again."
        )
    padding = fallback.unpack_bits(bitmask[:, -8:], 64)[:, (in_features - 1) % 64 + 1 :]
    if padding.any():
        raise BillhookError(f"A bitmask of {in_features} columns keeps weights beyond the last column. The packed file is damaged.")
    return fallback.row_starts(bitmask)


def expand(
    bitmask: Tensor, values: Tensor, starts: Tensor, in_features: int, *, rows: slice = _ALL, scales: Tensor | None = None
) -> Tensor:
    """The dense rows [rows, in_features] of a packed weight, in the dtype of `values`; int8 values need `scales` and give float32.

    `scales` is float32 [out] (one a row) or [out, ceil(in_features / group)] (one a run of `group` columns).
    """
    dense = fallback.expand(bitmask, values, starts, in_features, rows)
    if scales is None:
        return dense
    return dense.float() * spread_scales(scales[rows], in_features)


def spread_scales(scales: Tensor, in_features: int) -> Tensor:
    """Scales as something that multiplies rows [rows, in_features]."""
    if scales.ndim == 1:
        return scales[:, None]
    group = group_size(scales, in_features)
    return scales.repeat_interleave(group, dim=1)[:, :in_features]


def group_size(scales: Tensor, in_features: int) -> int:
    """Columns that share a scale: all of a row's, or the one power of two (16 at least) that gives this many groups.

    Raises BillhookError when no group size does.
    """
    if scales.ndim == 1:
        return in_features
    groups = scales.shape[1]
    for group in (2**power for power in range(4, 32)):
        if -(-in_features // group) == groups:
            return group
    raise BillhookError(f"{groups} scales a row do not fit {in_features} columns: a group is 16, 32, 64, ... columns.")


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmask, uint8 [out, 8 * ceil(in / 64)], and values, 1-D with 64 bytes of zeros behind them, of a dense weight [out, in].

    A weight is left out when all its bytes are zero, so -0.0 is kept and `expand` gives the same bytes back.
    """
    return fallback.pack(weight.detach())


def about() -> dict[str, object]:
    """What multiplies here: `path`, the name of the instruction set in use (`torch` without a compiled library)."""
    return {"path": "torch"}
