"""A linear layer whose weight stays packed as bitmask and values."""

from typing import Self

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.runtime import native
from billhook.runtime.fallback import TILE_WEIGHTS


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias with W [out, in] held as bitmask and values; inference only.

    Buffers: `bitmask` uint8 [out, 8 * ceil(in / 64)], `values` 1-D with 64 bytes of padding, `scales` float32 (int8 values only),
    `bias`. `row_starts` is made from the bitmask.
    """

    bitmask: Tensor
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    row_starts: Tensor

    def __init__(self, bitmask: Tensor, values: Tensor, row_starts: Tensor, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bitmask", bitmask)
        self.register_buffer("values", values)
        self.register_buffer("row_starts", row_starts, persistent=False)
        self.register_buffer("scales", None)
        self.register_buffer("bias", None)

    @classmethod
    def from_packed(
        cls,
        bitmask: Tensor,
        values: Tensor,
        row_starts: Tensor,
        in_features: int,
        out_features: int,
        *,
        bias: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Self:
        """Wrap packed tensors without copying them.

        Raises BillhookError when their shapes disagree.
        """
        nnz = int(row_starts[-1])
        if bitmask.shape[0] != out_features or row_starts.shape != (out_features + 1,):
            raise BillhookError(f"The bitmask has {bitmask.shape[0]} rows, the layer {out_features}. The packed file is damaged.")
        if values.ndim != 1 or values.numel() != nnz + 64 // values.element_size():
            raise BillhookError(f"The bitmask keeps {nnz} weights, but there are {values.numel()} values with their padding.")
        if (values.dtype == torch.int8) != (scales is not None):
            raise BillhookError(f"Values of {values.dtype} {'need' if scales is None else 'have no'} scales.")
        layer = cls(bitmask, values, row_starts, in_features, out_features)
        layer.scales, layer.bias = scales, bias
        return layer

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a dense weight [out, in]."""
        bitmask, values = native.pack(weight)
        return cls.from_packed(bitmask, values, native.row_starts(bitmask, weight.shape[1]), weight.shape[1], weight.shape[0], bias=bias)

    def dense(self) -> Tensor:
        """The weight [out, in] in the dtype of the values, float32 for int8."""
        return native.expand(self.bitmask, self.values, self.row_starts, self.in_features, scales=self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        flat = x.reshape(-1, self.in_features)
        y = torch.empty(flat.shape[0], self.out_features, dtype=x.dtype)
        step = max(1, TILE_WEIGHTS // self.in_features)
        for first in range(0, self.out_features, step):
            rows = slice(first, min(first + step, self.out_features))
            tile = native.expand(self.bitmask, self.values, self.row_starts, self.in_features, rows=rows, scales=self.scales)
            y[:, rows] = flat @ tile.to(x.dtype).T
        if self.bias is not None:
            y += self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and sparsity, as printed by torch."""
        kept = int(self.row_starts[-1]) / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={1 - kept:.3f}, values={self.values.dtype}"
