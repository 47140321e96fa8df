"""Gradient checkpointing: blocks keep only their inputs for the backward pass, and compute everything else again."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from billhook.errors import BillhookError


@contextmanager
def recomputing(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Let the blocks of a model in evaluation mode be computed again in the backward pass, where that is `wanted`.

    Raises BillhookError for a model whose blocks cannot do that.
    """
    if not wanted:
        yield
        return
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks or not model.supports_gradient_checkpointing:
        raise BillhookError(f"{type(model).__name__} has no gradient checkpointing: leave out --checkpointing.")
    for block in blocks:
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        block.gradient_checkpointing = block.training = True  # of the block alone: dropout inside stays off
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = block.training = False
