"""The compiled kernels in plain torch: packing gives the same bytes, products differ only in the order of sums.

`layout.py` describes a packed weight. `row_starts`, int64 [out + 1], is the position of each row's first value.
"""

import torch
from torch import Tensor

from billhook.runtime.layout import PADDING, mask_bytes


def unpack_bits(bitmask: Tensor, in_features: int) -> Tensor:
    """The keep mask, bool [rows, in_features]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return (bitmask.unsqueeze(-1) >> shifts & 1).flatten(1)[:, :in_features].bool()


def pack_bits(keep: Tensor) -> Tensor:
    """The bitmask, uint8, of a keep mask, bool [rows, columns]."""
    rows, columns = keep.shape
    bits = torch.zeros(rows, 8 * mask_bytes(columns), dtype=torch.uint8)
    bits[:, :columns] = keep
    weights = 2 ** torch.arange(8, dtype=torch.uint8)
    return (bits.view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def count_bits(bitmask: Tensor) -> Tensor:
    """The number of set bits in each byte, uint8 in the shape of `bitmask`."""
    ones = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.uint8, device=bitmask.device)
    return ones[bitmask.int()]


def row_starts(bitmask: Tensor) -> Tensor:
    """The position of each row's first value, int64 [rows + 1]: the cumulative count of set bits."""
    counts = count_bits(bitmask).sum(-1, dtype=torch.int64)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def expand(bitmask: Tensor, values: Tensor, starts: Tensor, in_features: int, rows: slice) -> Tensor:
    """The dense rows [rows, in_features] in the dtype of `values`, zero where nothing was kept."""
    keep = unpack_bits(bitmask[rows], in_features)
    first, last, _ = rows.indices(bitmask.shape[0])
    packed = values[int(starts[first]) : int(starts[last])] if last > first else values[:0]
    return torch.zeros(keep.shape, dtype=values.dtype).masked_scatter_(keep, packed)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmask and padded values of a dense weight [out, in]; weights with all bytes zero are removed (-0.0 is kept)."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.element_size()]
    keep = weight.contiguous().view(integers) != 0
    padding = torch.zeros(PADDING // weight.element_size(), dtype=weight.dtype)
    return pack_bits(keep), torch.cat([weight[keep], padding])
