"""The ways to multiply with a packed weight; which is fastest depends on shape, sparsity, token count and machine.

* `fused`: expand in registers and multiply at once, up to 8 tokens a pass; reads the packed bytes once a pass.
* `many`: expand some rows into a tile in each core's own cache and multiply it there by our own matrix product;
  activations in bfloat16, values too or int8, where the processor has the dot product of bfloat16.
* `kept`: multiply each kept weight with the activations of its column, those of many tokens side by side; in float32,
  and nothing is expanded.
* `tiles`: expand some rows, as many as stay in the cache, into a dense tile and give that to torch's matrix product.
* `wide`: the same with tiles four times as large, for machines with larger caches.
* `widened`: the same in float32, for float16, and for bfloat16 without its dot product: torch's own product of halves
  can be several times slower than that of float32.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from billhook.runtime import library
from billhook.runtime.native import Weight, expand_rows

MANY_AT_ONCE = 1024  # tokens, whose activations are rearranged before they are multiplied
TILE_BYTES = 2 << 20  # of dense weights; they are multiplied while they lie in the cache

_scratch = (
    threading.local()
)  # a tile is kept between calls: memory asked for anew costs a page fault every 4 KiB, more than the expansion


def fused(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out], straight from the packed bytes."""
    return weight.multiply(x, bias)


def kept(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, without the zeros."""
    return many(weight, x.float(), None if bias is None else bias.float()).to(x.dtype)


def many(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through tiles of a few rows and our own matrix product for bfloat16; what `kept` does for float32."""
    tokens = x.reshape(-1, weight.shape[1])
    parts = []
    for part in tokens.split(MANY_AT_ONCE):
        room = _room(weight.room_for(part.shape[0], x.dtype), torch.uint8)
        parts.append(weight.multiply_many(part, bias, room))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], weight.shape[0])


def tiles(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through dense tiles."""
    return _by_tiles(weight, x, bias, TILE_BYTES)


def wide(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through larger tiles."""
    return _by_tiles(weight, x, bias, 4 * TILE_BYTES)


def widened(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32."""
    return wide(weight, x.float(), bias).to(x.dtype)


def _by_tiles(weight: Weight, x: Tensor, bias: Tensor | None, tile_bytes: int) -> Tensor:
    shape, dtype = (*x.shape[:-1], weight.shape[0]), _common(weight.tensors[0].dtype, x.dtype)
    x, bias, given = x.reshape(-1, weight.shape[1]).to(dtype), None if bias is None else bias.to(dtype), x.dtype
    y = x.new_empty(x.shape[0], weight.shape[0])
    step = min(weight.shape[0], max(1, tile_bytes // (x.element_size() * weight.shape[1])))
    room = _room(step * weight.shape[1], weight.tensors[0].dtype)
    for first in range(0, weight.shape[0], step):
        last = min(first + step, weight.shape[0])
        tile = expand_rows(weight, first, last, dtype, room)
        if bias is None:
            torch.mm(x, tile.T, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, tile.T, out=y[:, first:last])
    return y.view(shape).to(given)


def _room(count: int, dtype: torch.dtype) -> Tensor:
    """This thread's scratch memory, 1-D, for `count` values."""
    held: dict[Any, Tensor] = _scratch.__dict__
    if dtype not in held or held[dtype].numel() < count:
        held[dtype] = torch.empty(count, dtype=dtype)
    return held[dtype]


def _common(values: torch.dtype, activations: torch.dtype) -> torch.dtype:
    """The dtype in which tiles are multiplied: float32 where two kinds of floats meet; int8 is rounded to that of the
    activations."""
    return activations if values in (activations, torch.int8) else torch.float32


WAYS: dict[str, Callable[[Weight, Tensor, Tensor | None], Tensor]] = {
    "fused": fused,
    "many": many,
    "kept": kept,
    "tiles": tiles,
    "wide": wide,
    "widened": widened,
}


def ways(weight: Weight, dtype: torch.dtype) -> list[str]:
    """The ways there are for activations of `dtype`: without compiled kernels nothing is fused."""
    found = ["fused"] if library.active() else []
    if dtype != torch.float32 and weight.room_for(1, dtype):
        found.append("many")
    if weight.room_for(1, torch.float32):
        found.append("kept")
    found += ["tiles", "wide"]
    return found if dtype == torch.float32 or "many" in found else [*found, "widened"]
