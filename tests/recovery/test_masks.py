"""Masks by parameter name, in families that store weights differently and in wrapped models."""

import families
import pytest
import tiny
import torch
from sparse_models import prune_at_random

import billhook
from billhook import BillhookError, find_layers
from billhook.recovery.masks import count_returned, find_masks, masked_gradients, project_, trained_masks

IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_masks_are_those_of_all_prunable_weights(family: str) -> None:
    model = families.build(family)
    random = torch.Generator().manual_seed(0)
    for layer in find_layers(model):
        layer.weight[torch.rand(layer.shape, generator=random) < 0.5] = 0
    masks = find_masks(model)
    kept = sum(int((layer.weight != 0).sum()) for layer in find_layers(model))
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    assert sum(mask.numel() for mask in masks.values()) == sum(layer.weight.numel() for layer in find_layers(model))
    assert all(torch.equal(mask, model.get_parameter(name) != 0) for name, mask in masks.items())


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_loop_of_ones_own_keeps_zeros(family: str, optimizer: type[torch.optim.Optimizer]) -> None:
    """With momentum from before, and twice with the same optimizer; without the masks they are lost."""
    model = families.build(family).train()
    adam = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1)
    step(model, adam)
    prune_at_random(model)
    masks = find_masks(model)
    for _ in range(2):
        with billhook.keep_masks(model) as kept:
            assert all(torch.equal(kept[name], masks[name]) for name in kept)
            before = [parameter.detach().clone() for parameter in model.parameters()]
            step(model, adam)
            step(model, adam)
        assert not count_returned(model, masks)
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True) if a.ndim > 1)
    step(model, adam)
    assert sum(count_returned(model, masks).values()) > 0.9 * sum(int((~mask).sum()) for mask in masks.values())
    project_(model, masks)
    assert not count_returned(model, masks)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_gradients_are_masked_before_they_are_clipped() -> None:
    model = prune_at_random(tiny.llama()).train()
    with billhook.keep_masks(model):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(not parameter.grad[~(parameter != 0)].any() for parameter in model.parameters())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert any(parameter.grad[~(parameter != 0)].any() for parameter in model.parameters())


def test_masked_gradients_alone_are_not_enough_for_muon() -> None:
    model = prune_at_random(tiny.llama()).train()
    masks, muon = find_masks(model), torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)
    with masked_gradients(model, masks):
        step(model, muon)
    assert count_returned(model, masks).keys() == masks.keys()


def test_a_compiled_model_has_the_masks_of_the_model_inside() -> None:
    model = prune_at_random(tiny.llama())
    masks, compiled = find_masks(model), find_masks(torch.compile(model, backend="eager"))
    assert list(masks) == list(compiled)


def test_what_has_no_masks_is_refused() -> None:
    with pytest.raises(BillhookError, match="No prunable weight of LlamaForCausalLM is zero"):
        trained_masks(tiny.llama())
    with pytest.raises(BillhookError, match="No weight that holds zeros is trained"):
        trained_masks(prune_at_random(tiny.llama()).requires_grad_(False))
    with pytest.raises(BillhookError, match="must be a transformers PreTrainedModel, got Linear"):
        find_masks(torch.nn.Linear(8, 8))


def test_a_model_that_changed_after_its_masks_were_made_is_refused() -> None:
    model = prune_at_random(tiny.llama())
    masks = find_masks(model)
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.ones(8, 32))
    with pytest.raises(BillhookError, match=r"up_proj.weight has the shape \[8, 32\] now, its mask \[64, 32\].*Wrap"):
        project_(model, masks)
