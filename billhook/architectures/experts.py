"""Mixtures of experts: the implementation that can be observed."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from billhook.architectures.layers import find_layers


@contextmanager
def observable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Make every expert compute its own product, so that it can be observed; restore the implementation afterwards."""
    before = model.config._experts_implementation
    if before == "eager" or not any(layer.expert is not None for layer in find_layers(model)):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
