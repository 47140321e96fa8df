"""A linear layer whose weight stays packed as bitmask and values."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.runtime import autotune, native, ops
from billhook.runtime.layout import PADDING

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class SparseLinear(nn.Module):
    """y = x Wᵀ + bias with W [out, in] held as bitmask and values; inference only.

    Buffers: `bitmask`, `values` with their padding, `scales` (int8 values only) as in `layout.py`, and `bias` [out].
    `row_starts`, int64 [out + 1], follows from the bitmask.
    """

    bitmask: Tensor
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    row_starts: Tensor
    gpu_state: Any = None  # what `gpu.py` keeps with a layer

    def __init__(
        self, bitmask: Tensor, values: Tensor, row_starts: Tensor, in_features: int, out_features: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("bitmask", bitmask.contiguous())
        self.register_buffer("values", values.contiguous())
        self.register_buffer("row_starts", row_starts.contiguous(), persistent=False)
        self.register_buffer("scales", None)
        self.register_buffer("bias", None)
        self._weight: native.Weight | None = None

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
        _check(bitmask, values, row_starts, out_features, scales)
        layer = cls(bitmask, values, row_starts, in_features, out_features)
        layer.scales = None if scales is None else scales.contiguous()
        layer.bias = None if bias is None else bias.detach()
        return layer

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a dense weight [out, in]."""
        bitmask, values = native.pack(weight)
        return cls.from_packed(
            bitmask, values, native.row_starts(bitmask, weight.shape[1]), weight.shape[1], weight.shape[0], bias=bias
        )

    def dense(self) -> Tensor:
        """The weight [out, in] in the dtype of the values, float32 for int8."""
        return native.expand(self.bitmask, self.values, self.row_starts, self.in_features, scales=self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x.

        Raises BillhookError for x of another width or dtype than bfloat16, float16 and float32, and in a backward pass.
        """
        if x.shape[-1] != self.in_features or x.dtype not in DTYPES:
            raise BillhookError(
                f"A layer of {self.in_features} inputs in bfloat16, float16 or float32 was given {x.dtype} "
                f"{list(x.shape)}."
            )
        if x.is_cuda:
            from billhook.runtime import gpu

            return gpu.forward(self, x)
        bias = self._buffers["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        if (
            type(x) is not Tensor
            or torch.compiler.is_compiling()
            or (x.requires_grad and torch.is_grad_enabled())
            or x.is_meta
        ):
            return ops.sparse_linear(x, self.bitmask, self.values, self.row_starts, self.scales, bias)
        return autotune.product(self.packed(), x, bias)

    def packed(self) -> native.Weight:
        """The weight as the kernels read it; made again when a buffer was replaced or has moved."""
        held, weight = self._buffers, self._weight
        bitmask, values = held["bitmask"], held["values"]
        assert bitmask is not None
        assert values is not None
        if weight is not None:
            seen = weight.matrix
            if (
                seen.values == values.data_ptr()
                and seen.bitmask == bitmask.data_ptr()
                and weight.tensors[3] is held["scales"]
            ):
                return weight
        self._weight = native.Weight(
            self.out_features, self.in_features, values, bitmask, self.row_starts, held["scales"]
        )
        return self._weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Accept packed tensors with any number of values, after checking that they agree."""
        names = [name for name in ("bitmask", "values", "scales", "bias") if f"{prefix}{name}" in state_dict]
        given = {name: state_dict[f"{prefix}{name}"] for name in names}
        if "bitmask" in given and "values" in given:
            starts = native.row_starts(given["bitmask"], self.in_features)
            _check(given["bitmask"], given["values"], starts, self.out_features, given.get("scales", self.scales))
            self.row_starts = starts
            for name, tensor in given.items():
                setattr(self, name, tensor.clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Shape and sparsity, as printed by torch."""
        kept = int(self.row_starts[-1]) / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, sparsity={1 - kept:.3f}, "
            f"values={self.values.dtype}"
        )


def _check(bitmask: Tensor, values: Tensor, row_starts: Tensor, out_features: int, scales: Tensor | None) -> None:
    nnz = int(row_starts[-1])
    if bitmask.shape[0] != out_features or row_starts.shape != (out_features + 1,):
        raise BillhookError(
            f"The bitmask has {bitmask.shape[0]} rows, the layer {out_features}. The packed file is damaged."
        )
    if values.ndim != 1 or values.numel() != nnz + PADDING // values.element_size():
        raise BillhookError(
            f"The bitmask keeps {nnz} weights, but there are {values.numel()} values with their padding."
        )
    if (values.dtype == torch.int8) != (scales is not None):
        raise BillhookError(f"Values of {values.dtype} {'need' if scales is None else 'have no'} scales.")
