"""Weights that are put back after something was tried on them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from billhook.architectures.layers import Layer


@contextmanager
def restored(layers: Sequence[Layer]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of the weights [out, in] by layer name, and put the weights back at the end, bit for bit."""
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
