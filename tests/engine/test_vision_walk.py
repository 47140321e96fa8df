"""The walk of image models equals their own forward pass, and their gradients are those of autograd."""

import pytest
import torch
import vision_families
from vision_families import FAMILIES
from walked import check_walk

from billhook.architectures.layers import find_layers
from billhook.engine.gradients import compute_gradients
from billhook.tasks.opening import task_of


def pixels(rows, seed=0):
    return torch.randn(
        rows, 3, vision_families.SIZE, vision_families.SIZE, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_walk_equals_the_pruned_models_own_forward_bit_for_bit(family):
    batches = [{"pixel_values": pixels(3)}, {"pixel_values": pixels(2, 1)}]
    check_walk(vision_families.build(family), vision_families.build(family), batches)


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
