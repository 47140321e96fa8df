"""The walk of image models equals their own forward pass, and their gradients are those of autograd."""

import pytest
import torch
import vision_families
from vision_families import FAMILIES

from billhook.architectures.layers import find_layers
from billhook.architectures.stacks import blocks_of
from billhook.engine.gradients import compute_gradients
from billhook.engine.replay import run_block
from billhook.engine.walk import walk
from billhook.tasks.opening import task_of


def pixels(rows, seed=0):
    return torch.randn(
        rows, 3, vision_families.SIZE, vision_families.SIZE, generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def inputs_and_outputs(model, batches):
    """The inputs and the outputs of all blocks in the model's own forward pass."""
    blocks, seen, ends = list(blocks_of(model).values()), [], []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, named: seen.append((args[0] if args else next(iter(named.values()))).clone()),
            with_kwargs=True,
        )
        for block in blocks
    ]
    handles += [
        block.register_forward_hook(
            lambda _, args, out: ends.append((out[0] if isinstance(out, tuple) else out).clone())
        )
        for block in blocks
    ]
    for batch in batches:
        model(pixel_values=batch)
    for handle in handles:
        handle.remove()
    return [[states[index :: len(blocks)] for index in range(len(blocks))] for states in (seen, ends)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_pruned_walk_equals_the_pruned_models_own_forward_bit_for_bit(family):
    model, dense = vision_families.build(family), vision_families.build(family)
    batches, random = [pixels(3), pixels(2, 1)], torch.Generator().manual_seed(0)
    found, ends, streams = [], [], []
    statistics = ("input_norm", "gram", "drift")
    for block in walk(model, [{"pixel_values": x} for x in batches], statistics, dense_outputs=True):
        for layers, _ in block.stages:
            for layer in layers:
                layer.weight.mul_(torch.rand(layer.shape, generator=random) > 0.5)
        found.append([states.clone() for states in block.inputs])
        pairs = zip(block.inputs, block.calls, strict=True)
        ends.append([run_block(block.module, states, call) for states, call in pairs])
        streams.append([states.clone() for states in block.dense])
    assert {layer.block for layer in find_layers(model)} <= set(range(len(found)))
    inputs, outputs = inputs_and_outputs(model, batches)
    for expected, walked in ((inputs, found), (outputs, ends), (inputs_and_outputs(dense, batches)[1], streams)):
        for own, here in zip(expected, walked, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(own, here, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_loss_of_image_classifiers_are_those_of_autograd(family, tmp_path):
    model = vision_families.build(family)
    batch = {"pixel_values": pixels(3), "labels": torch.tensor([1, 4, 2])}
    layers = find_layers(model)
    found = compute_gradients(model, batch, "gradient_l1", tmp_path / "g.safetensors", loss=task_of(model).loss)
    expected = {layer.name: torch.zeros(layer.shape) for layer in layers}
    for row in range(3):
        model.zero_grad()
        model(pixel_values=batch["pixel_values"][row : row + 1], labels=batch["labels"][row : row + 1]).loss.backward()
        for layer in layers:
            expected[layer.name] += layer.view(layer.stored.grad).abs()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_patch_embedding_head_and_depthwise_convolutions_are_not_pruned():
    for family in ("vit", "convnext"):
        names = {layer.name for layer in find_layers(vision_families.build(family))}
        assert not [name for name in names if "embed" in name or "classifier" in name or "dwconv" in name]
    assert {layer.kind for layer in find_layers(vision_families.build("convnext"))} == {"pwconv1", "pwconv2"}
