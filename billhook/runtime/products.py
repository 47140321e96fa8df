"""The ways to multiply with a packed weight; which is fastest depends on shape, sparsity, token count and machine.

* `fused`: expand in registers and multiply at once, up to 8 tokens a pass; reads the packed bytes once a pass.
* `tiles`: expand some rows, as many as stay in the cache, into a dense tile and give that to torch's matrix product.
* `whole`: expand the whole weight, then one matrix product.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from billhook.runtime import library
from billhook.runtime.native import Weight, expand_rows

TILE_BYTES = 1 << 20  # of dense weights; they are multiplied while they lie in a core's cache


def fused(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out], straight from the packed bytes."""
    return weight.multiply(x, bias)


def tiles(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through dense tiles."""
    return _by_tiles(weight, x, bias, max(1, TILE_BYTES // (x.element_size() * weight.shape[1])))


def whole(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same through the dense weight."""
    return _by_tiles(weight, x, bias, weight.shape[0])


def _by_tiles(weight: Weight, x: Tensor, bias: Tensor | None, step: int) -> Tensor:
    shape, dtype = (*x.shape[:-1], weight.shape[0]), _common(weight.tensors[0].dtype, x.dtype)
    x, bias, given = x.reshape(-1, weight.shape[1]).to(dtype), None if bias is None else bias.to(dtype), x.dtype
    y = x.new_empty(x.shape[0], weight.shape[0])
    for first in range(0, weight.shape[0], step):
        last = min(first + step, weight.shape[0])
        tile = expand_rows(weight, first, last, dtype)
        if bias is None:
            torch.mm(x, tile.T, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, tile.T, out=y[:, first:last])
    return y.view(shape).to(given)


def _common(values: torch.dtype, activations: torch.dtype) -> torch.dtype:
    """The dtype in which tiles are multiplied: float32 where two kinds of floats meet; int8 is rounded to that of the activations."""
    return activations if values in (activations, torch.int8) else torch.float32


WAYS: dict[str, Callable[[Weight, Tensor, Tensor | None], Tensor]] = {"fused": fused, "tiles": tiles, "whole": whole}


def ways() -> list[str]:
    """The ways there are here: without compiled kernels nothing is fused."""
    return list(WAYS) if library.active() else ["tiles", "whole"]
