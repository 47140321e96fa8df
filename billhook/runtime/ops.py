"""Products with packed weights as torch operators without derivatives, for torch.compile and fake tensors."""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.runtime import autotune
from billhook.runtime.native import Weight, check


@torch.library.custom_op("billhook::sparse_linear", mutates_args=())
def sparse_linear(
    x: Tensor, bitmask: Tensor, values: Tensor, row_starts: Tensor, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [..., in] times a packed weight [out, in], plus bias -> [..., out] in the dtype of x, on the CPU."""
    shape = bitmask.shape[0], x.shape[-1]
    check(bitmask, values, row_starts, shape, scales)
    weight = Weight(*shape, values, bitmask, row_starts, scales)
    return autotune.product(weight, x, bias)


@sparse_linear.register_fake
def _(
    x: Tensor, bitmask: Tensor, values: Tensor, row_starts: Tensor, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], bitmask.shape[0])


@torch.library.custom_op("billhook::dense_linear", mutates_args=())
def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a dense bfloat16 weight [out, in], plus bias, in the dtype of x, on the CPU."""
    return autotune.dense_product(Weight(*weight.shape, weight), x, bias)


@dense_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _no_derivative(context: object, gradient: Tensor) -> None:
    raise BillhookError("Packed layers are for inference and have no gradients: train the dense model.")


sparse_linear.register_autograd(_no_derivative)
dense_linear.register_autograd(_no_derivative)
