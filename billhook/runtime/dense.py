"""A dense bfloat16 linear layer that uses our matrix-vector kernel where that is faster than torch's."""

import torch
from torch import Tensor, nn

from billhook.runtime import autotune, native, ops


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
