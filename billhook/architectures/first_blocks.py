"""A model truncated to its first blocks for a `with` block, to run a small part of a job on it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from billhook.architectures.config import text_config
from billhook.architectures.stacks import decoder_stack


@contextmanager
def first_blocks(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Keep only the first `depth` blocks; afterwards restore the others, and the parameters of the first ones.

    A copy of these parameters is in memory, except for a streamed model, whose changes do not last anyway.
    """
    blocks, config = model.get_submodule(decoder_stack(model).name), text_config(model.config)
    assert isinstance(blocks, nn.ModuleList)
    count, others = len(blocks), list(blocks)[depth:]
    before = [(p, p.detach().clone()) for p in blocks[:depth].parameters() if not p.is_meta]
    del blocks[depth:]
    config.num_hidden_layers = len(blocks)
    try:
        yield
    finally:
        blocks.extend(others)
        config.num_hidden_layers = count
        for p, value in before:
            p.data.copy_(value)
