"""The ways to multiply with a packed weight; which is fastest depends on shape, sparsity, token count and machine.

* `fused`: expand in registers and multiply at once, up to 8 tokens a pass; reads the packed bytes once a pass.
* `tiles`: expand some rows, as many as stay in the cache, into a dense tile and give that to torch's matrix product.
* `wide`: the same with tiles four times as large, for machines with larger caches.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from billhook.runtime import library
from billhook.runtime.native import Weight, expand_rows

TILE_BYTES = 2 << 20  # of dense weights; they are multiplied while they lie in the cache

_scratch = threading.local()  # a tile is kept between calls: memory asked for anew costs a page fault every 4 KiB, more than the expansion


def fused(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out], straight from the packed bytes."""
    return weight.multiply(x, bias)


def tiles(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through dense tiles."""
    return _by_tiles(weight, x, bias, TILE_BYTES)


def wide(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through larger tiles."""
    return _by_tiles(weight, x, bias, 4 * TILE_BYTES)


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
    """The dtype in which tiles are multiplied: float32 where two kinds of floats meet; int8 is rounded to that of the activations."""
    return activations if values in (activations, torch.int8) else torch.float32


WAYS: dict[str, Callable[[Weight, Tensor, Tensor | None], Tensor]] = {"fused": fused, "tiles": tiles, "wide": wide}


def ways() -> list[str]:
    """The ways there are here: without compiled kernels nothing is fused."""
    return list(WAYS) if library.active() else ["tiles", "wide"]
