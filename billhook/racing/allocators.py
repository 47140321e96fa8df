"""Allocators of levels (types, sparsities) that need the model: functions `(weights, costs, budget) -> levels`."""

from billhook.plan.allocators import ALLOCATORS
from billhook.registry import Registry

MODEL_ALLOCATORS = Registry("allocator", {"rco": "billhook.racing.rco:rco"})


def registry_of(allocator: str) -> Registry:
    """The registry of an allocator of sparsities."""
    return MODEL_ALLOCATORS if allocator in MODEL_ALLOCATORS.built_in else ALLOCATORS
