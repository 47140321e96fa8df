"""The walk of a model beside the model's own forward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from billhook.architectures.layers import find_layers
from billhook.architectures.stacks import blocks_of
from billhook.engine.replay import run_block
from billhook.engine.walk import walk

States = list[list[Tensor]]  # by block and batch


@torch.no_grad()
def inputs_and_outputs(model: Any, batches: Sequence[dict[str, Tensor]], **options: Any) -> list[States]:
    """The inputs and the outputs of all blocks in the model's own forward pass."""
    blocks, seen, ends = list(blocks_of(model).values()), [], []

    def before(_, args, named):
        seen.append((args[0] if args else next(iter(named.values()))).clone())

    def after(_, args, out):
        ends.append((out[0] if isinstance(out, tuple) else out).clone())

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after) for block in blocks]
    for inputs in batches:
        model(**{key: value for key, value in inputs.items() if key != "labels"}, **options)
    for handle in handles:
        handle.remove()
    return [[states[index :: len(blocks)] for index in range(len(blocks))] for states in (seen, ends)]


@torch.no_grad()
def check_walk(
    model: Any, dense: Any, batches: Sequence[dict[str, Tensor]], *, convolutions: bool = False, **options: Any
) -> None:
    """Prune `model` at random while it is walked: inputs and outputs of all blocks are those of its own forward pass,
    and the dense outputs beside them those of `dense`, the same model, bit for bit."""
    random, found, ends, streams = torch.Generator().manual_seed(0), [], [], []
    every = find_layers(model, convolutions=convolutions)
    for block in walk(model, batches, ("input_norm", "gram", "drift"), layers=every, dense_outputs=True):
        for layers, _ in block.stages:
            for layer in layers:
                layer.weight.mul_(torch.rand(layer.shape, generator=random) > 0.5)
        found.append([states.clone() for states in block.inputs])
        pairs = zip(block.inputs, block.calls, strict=True)
        ends.append([run_block(block.module, states, call) for states, call in pairs])
        streams.append([states.clone() for states in block.dense])
    assert len(found) == len(blocks_of(model))
    inputs, outputs = inputs_and_outputs(model, batches, **options)
    dense_outputs = inputs_and_outputs(dense, batches, **options)[1]
    for expected, walked in ((inputs, found), (outputs, ends), (dense_outputs, streams)):
        for own, here in zip(expected, walked, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, here, strict=True))
