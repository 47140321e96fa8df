"""A model cut off after its first blocks for a while, to run a small part of a job on it."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from billhook.architectures.layers import find_blocks


@contextmanager
def first_blocks(model: PreTrainedModel, depth: int) -> Iterator[None]:
    """Let the model have only its first `depth` blocks inside the `with`; afterwards it has all of them again, with the
    parameters from before.

    Memory holds a copy of those blocks' parameters, unless the model is streamed: then changes are not kept anyway.
    """
    blocks, config = find_blocks(model)[1], model.config.get_text_config(decoder=True)
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
