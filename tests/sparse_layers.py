"""Random sparse layers, and the bound that their products keep."""

import torch
from torch import Tensor

from billhook.runtime import native
from billhook.runtime.linear import SparseLinear

ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-22}


def random_weight(shape: tuple[int, int], share: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values of which `share` are kept; the first row is empty, the last one full."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    W[torch.rand(shape, generator=generator) >= share] = 0
    W[0] = 0
    W[-1] = torch.randn(shape[1], generator=generator)
    if dtype == torch.int8:
        W = (40 * W).round().clamp(-127, 127)
        W[-1, 0] = -128
    return W.to(dtype)


def layer(W: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> SparseLinear:
    bitmask, values = native.pack(W)
    starts = native.row_starts(bitmask, W.shape[1])
    return SparseLinear(bitmask, values, starts, W.shape[1], bias=bias, scales=scales)


def assert_product(y: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None, rounded: bool = False) -> None:
    """y is x Wᵀ + bias up to the stated tolerance; W in float64, `rounded` where its entries are rounded first."""
    product = x.double() @ W.T
    exact = product + (0 if bias is None else bias.double())
    terms = x.double().abs() @ W.abs().T
    allowed = (
        terms * (2**-20 + rounded * ROUNDING[x.dtype]) + (exact.abs() + product.abs()) * ROUNDING[x.dtype] + 2**-24
    )
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    worst = ((y.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{float(worst)} times the tolerance"
