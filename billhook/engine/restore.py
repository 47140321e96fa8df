"""Changes to weights and to their gradient flags that last for a `with` block."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from billhook.architectures.layers import Layer


@contextmanager
def restored(layers: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the weights [out, in] by layer name, and restore the weights at the end, bit for bit."""
    weights = {layer.name: layer.weight.clone() for layer in layers}
    try:
        yield weights
    finally:
        restore_(layers, weights)


@torch.no_grad()
def restore_(layers: Sequence[Layer], weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` [out, in], by layer name, into the model."""
    for layer in layers:
        layer.weight.copy_(weights[layer.name])


@contextmanager
def exchanged(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Give parameters other values, (parameter, value), and restore their own afterwards, without a copy."""
    values = list(values)
    own = [(p, p.data) for p, _ in values]
    for p, value in values:
        p.data = value
    try:
        yield
    finally:
        for p, value in own:
            p.data = value


@contextmanager
def differentiable(wanted: Iterable[Tensor], unwanted: Iterable[Tensor] = ()) -> Iterator[None]:
    """Require gradients for `wanted` and for no other tensor of `unwanted`, and restore the flags afterwards."""
    wanted, unwanted = list(wanted), list(unwanted)
    flags = [(p, p.requires_grad) for p in [*unwanted, *wanted]]
    for p in unwanted:
        p.requires_grad_(False)
    for p in wanted:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
