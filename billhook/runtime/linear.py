"""Linear layers on our kernels: one whose weight stays packed as bitmask and values, and a dense bfloat16 one."""

from collections.abc import Callable
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
    `row_starts`, int64 [out + 1], follows from the bitmask. `computed` is empty, in the dtype of the activations.
    """

    bitmask: Tensor
    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    row_starts: Tensor
    computed: Tensor
    gpu_state: Any = None  # `gpu.State`

    def __init__(
        self,
        bitmask: Tensor,
        values: Tensor,
        row_starts: Tensor,
        in_features: int,
        *,
        bias: Tensor | None = None,
        scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap packed tensors without copying them, for a model that computes in `dtype`, by default that of the
        values; raises BillhookError when their shapes disagree."""
        super().__init__()
        self.in_features, self.out_features = in_features, bitmask.shape[0]
        native.check(bitmask, values, row_starts, (self.out_features, in_features), scales)
        self.register_buffer("bitmask", bitmask.contiguous())
        self.register_buffer("values", values.contiguous())
        self.register_buffer("row_starts", row_starts.contiguous(), persistent=False)
        self.register_buffer("scales", None if scales is None else scales.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach())
        dtype = dtype or (values.dtype if scales is None else torch.float32)
        self.register_buffer("computed", torch.empty(0, dtype=dtype, device=values.device), persistent=False)
        self._weight: native.Weight | None = None

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, without values: models such as T5 convert their activations to its dtype."""
        return torch.empty(self.out_features, self.in_features, dtype=self.computed.dtype, device="meta")

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a dense weight [out, in]."""
        bitmask, values = native.pack(weight)
        return cls(bitmask, values, native.row_starts(bitmask, weight.shape[1]), weight.shape[1], bias=bias)

    def dense(self) -> Tensor:
        """The weight [out, in] in the dtype of the values, float32 for int8."""
        return native.expand(self.bitmask, self.values, self.row_starts, self.in_features, scales=self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x.

        Raises BillhookError for x of another width or dtype than bfloat16, float16 and float32, and in a backward pass.
        """
        if x.shape[-1] != self.in_features or x.dtype not in DTYPES:
            expected = f"{self.in_features} inputs in bfloat16, float16 or float32"
            raise BillhookError(f"A layer of {expected} was given {x.dtype} {list(x.shape)}.")
        if x.is_cuda:
            from billhook.runtime import gpu

            return gpu.forward(self, x)
        bias = self._buffers["bias"]
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        traced = type(x) is not Tensor or torch.compiler.is_compiling() or x.is_meta
        if traced or (x.requires_grad and torch.is_grad_enabled()):
            return ops.sparse_linear(x, self.bitmask, self.values, self.row_starts, self.scales, bias)
        return autotune.product(self.packed(), x, bias)

    def packed(self) -> native.Weight:
        """The weight as the kernels read it, made again after a buffer was replaced or moved."""
        held, weight = self._buffers, self._weight
        bitmask, values, scales = held["bitmask"], held["values"], held["scales"]
        assert bitmask is not None
        assert values is not None
        if weight is not None and weight.tensors[3] is scales:
            seen = weight.matrix
            if seen.values == values.data_ptr() and seen.bitmask == bitmask.data_ptr():
                return weight
        shape = self.out_features, self.in_features
        native.check(bitmask, values, self.row_starts, shape, scales)
        self._weight = native.Weight(*shape, values, bitmask, self.row_starts, scales)
        return self._weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert the buffers, as `to` does: of the packed weight only values in one of DTYPES change their
        dtype, and keep their padding in bytes."""
        held = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in ("bitmask", "row_starts", "scales", "values"):
            old, new = held[name], self._buffers[name]
            if old is None or new is None or old.dtype == new.dtype:
                continue
            if name != "values" or old.dtype == torch.int8 or new.dtype not in DTYPES:
                self._buffers[name] = old.to(new.device)
            else:
                longer = PADDING // new.element_size() - PADDING // old.element_size()
                self._buffers[name] = nn.functional.pad(new, (0, longer))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Accept packed tensors with any number of values that agree."""
        names = [name for name in ("bitmask", "values", "scales", "bias") if f"{prefix}{name}" in state_dict]
        given = {name: state_dict[f"{prefix}{name}"] for name in names}
        if "bitmask" in given and "values" in given:
            starts = native.row_starts(given["bitmask"], self.in_features)
            shape = self.out_features, self.in_features
            native.check(given["bitmask"], given["values"], starts, shape, given.get("scales", self.scales))
            self.row_starts = starts
            for name, tensor in given.items():
                setattr(self, name, tensor.clone())
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """Shape and sparsity, as printed by torch."""
        sparsity = 1 - int(self.row_starts[-1]) / (self.in_features * self.out_features)
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, sparsity={sparsity:.3f}, values={self.values.dtype}"


class DenseLinear(nn.Linear):
    """An `nn.Linear` in bfloat16 on the CPU; other dtypes and devices, and training, use torch as before."""

    _weight: native.Weight

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the dtype of x."""
        weight, trained = self.weight, input.requires_grad and torch.is_grad_enabled()
        if trained or input.dtype != torch.bfloat16 or not is_supported(weight):
            return super().forward(input)
        if torch.compiler.is_compiling() or type(input) is not Tensor:
            return ops.dense_linear(input, weight, self.bias)
        if self._weight.matrix.values != weight.data_ptr():
            self._weight = native.Weight(*weight.shape, weight.detach())
        return autotune.dense_product(self._weight, input, self.bias)


def is_supported(weight: Tensor) -> bool:
    """Whether our dense kernel can multiply with this weight [out, in]."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()


def adopt_(layer: nn.Linear) -> None:
    """Turn a plain `nn.Linear` into a DenseLinear in place; its parameters, hooks and names stay."""
    layer.__class__ = DenseLinear
    layer._weight = native.Weight(*layer.weight.shape, layer.weight.detach())  # type: ignore[assignment]
