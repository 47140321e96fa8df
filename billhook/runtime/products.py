"""The ways to multiply with a packed weight; which is fastest depends on shape, sparsity, token count and machine.

* `fused`: expand in registers and multiply at once, up to 8 tokens per pass; reads the packed bytes once per pass.
* `tiled_gemm`: expand some rows into a tile in each core's own cache and multiply it there by our own matrix product;
  activations in bfloat16, values in bfloat16 or int8, on processors with the bfloat16 dot-product instruction.
* `sparse_gemm`: multiply each kept weight with the activations of its column for many tokens at once, in float32;
  nothing is expanded.
* `tiles`: expand as many rows as fit the cache into a dense tile and let torch multiply it.
* `large_tiles`: the same with tiles four times as large, for machines with larger caches.
* `fp32_tiles`: large tiles in float32, for float16, and for bfloat16 without its dot-product instruction: torch's own
  product in those types can be several times slower than in float32.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from billhook.runtime import library
from billhook.runtime.native import Weight, expand_rows

GEMM_TOKENS = 1024  # tokens whose activations are rearranged at a time
TILE_BYTES = 2 << 20  # of a dense tile, which stays in the cache while it is multiplied

# Scratch memory is reused: page faults in newly allocated memory cost more than the expansion itself.
_scratch = threading.local()


def fused(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times the weight, plus bias -> [..., out], directly from the packed bytes."""
    return weight.multiply(x, bias)


def sparse_gemm(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same in float32, without multiplying zeros."""
    return _gemm(weight, x.float(), None if bias is None else bias.float()).to(x.dtype)


def tiled_gemm(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through small tiles and our own matrix product in bfloat16."""
    return _gemm(weight, x, bias)


def tiles(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through dense tiles and torch's matrix product."""
    return _by_tiles(weight, x, bias, TILE_BYTES)


def large_tiles(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through larger tiles."""
    return _by_tiles(weight, x, bias, 4 * TILE_BYTES)


def fp32_tiles(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through larger tiles in float32."""
    return large_tiles(weight, x.float(), bias).to(x.dtype)


def _gemm(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The product by the kernel for many tokens that the dtype of x selects: sparse in float32, tiled in bfloat16."""
    parts = []
    for part in x.reshape(-1, weight.shape[1]).split(GEMM_TOKENS):
        room = _room(weight.gemm_bytes(part.shape[0], x.dtype), torch.uint8)
        parts.append(weight.gemm(part, bias, room))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*x.shape[:-1], weight.shape[0])


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
    """The dtype in which tiles are multiplied: that of the activations for equal dtypes and int8, otherwise float32."""
    return activations if values in (activations, torch.int8) else torch.float32


_FUNCTIONS = (fused, tiled_gemm, sparse_gemm, tiles, large_tiles, fp32_tiles)
WAYS: dict[str, Callable[[Weight, Tensor, Tensor | None], Tensor]] = {f.__name__: f for f in _FUNCTIONS}


def ways(weight: Weight, dtype: torch.dtype) -> list[str]:
    """The ways available for activations of `dtype`: only tiles without compiled kernels."""
    found = ["fused"] if library.active() else []
    if dtype != torch.float32 and weight.gemm_bytes(1, dtype):
        found.append("tiled_gemm")
    if weight.gemm_bytes(1, torch.float32):
        found.append("sparse_gemm")
    found += ["tiles", "large_tiles"]
    return found if dtype == torch.float32 or "tiled_gemm" in found else [*found, "fp32_tiles"]
