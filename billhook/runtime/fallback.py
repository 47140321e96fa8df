"""Everything the compiled kernels do, in plain torch: the same bytes where bytes are made, the same product up to
rounding order.

A weight W [out, in] is a bitmask, uint8 [out, 8 * ceil(in / 64)] (bit j % 8 of byte j // 8 of a row is set where column
j is kept, padding bits are zero), and its kept values in row-major order, 1-D, followed by 64 bytes of zeros.
`row_starts`, int64 [out + 1], says where each row's values begin.
"""

import torch
from torch import Tensor

from billhook.packed.format import mask_bytes

TILE_WEIGHTS = 1 << 20  # expanded at a time: 2 MiB of bfloat16, which stays in a core's cache while it is multiplied


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


def row_starts(bitmask: Tensor) -> Tensor:
    """Where each row's values begin, int64 [rows + 1]: the cumulative count of set bits."""
    ones = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.uint8)
    counts = ones[bitmask.int()].sum(-1, dtype=torch.int64)
    return torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def expand(bitmask: Tensor, values: Tensor, starts: Tensor, in_features: int, rows: slice) -> Tensor:
    """The rows [rows, in_features] in the values' dtype, zeros where nothing was kept."""
    keep = unpack_bits(bitmask[rows], in_features)
    first, last, _ = rows.indices(bitmask.shape[0])
    packed = values[int(starts[first]) : int(starts[last])] if last > first else values[:0]
    return torch.zeros(keep.shape, dtype=values.dtype).masked_scatter_(keep, packed)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bitmask and padded values of a dense weight [out, in]; a weight counts as zero when all its bytes are zero (so
    -0.0 is kept)."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.element_size()]
    keep = weight.contiguous().view(integers) != 0
    padding = torch.zeros(64 // weight.element_size(), dtype=weight.dtype)
    return pack_bits(keep), torch.cat([weight[keep], padding])
