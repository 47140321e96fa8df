"""Allocators of levels that need the model itself: functions `(weights, costs, budget, *, options) -> levels`."""

from billhook.registry import Registry

MODEL_ALLOCATORS = Registry("level allocator", {"rco": "billhook.racing.rco:rco"})
