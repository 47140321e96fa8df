"""The walk of models with several stacks equals their own forward pass; dead blocks and blocks that do not run."""

import multimodal_families
import pytest
import torch
from multimodal_families import FAMILIES, batch, build
from walked import check_walk

from billhook import BillhookError, allocate, measure, prune, prune_
from billhook.architectures.layers import find_layers
from billhook.architectures.stacks import blocks_in, blocks_of
from billhook.engine.dead_blocks import dead_blocks
from billhook.engine.gradients import compute_gradients
from billhook.tasks.opening import task_of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pruned_walk_equals_the_pruned_models_own_forward_bit_for_bit(family):
    check_walk(build(family), build(family), [batch(family, 2), batch(family, 1, 1)], use_cache=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_autograd(family, tmp_path):
    model, inputs = build(family), batch(family, 2)
    layers = find_layers(model)
    found = compute_gradients(model, inputs, "gradient_l1", tmp_path / "g.safetensors", loss=task_of(model).loss)
    expected = {layer.name: torch.zeros(layer.shape) for layer in layers}
    for row in range(len(inputs["input_ids"])):
        model.zero_grad()
        one = inputs if len(inputs["input_ids"]) == 1 else {key: x[row : row + 1] for key, x in inputs.items()}
        model(**one).loss.backward()
        for layer in layers:
            if layer.stored.grad is not None:
                expected[layer.name] += layer.view(layer.stored.grad).abs()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_stacks_are_the_decoder_by_default_and_what_is_named(family):
    model, names = build(family), list(blocks_of(build(family)))
    language, vision = blocks_in(model, ["language"]), blocks_in(model, ["vision"])
    parts = [index for found in (vision, language) for indices in found.values() for index in indices]
    others = {"blip-2": [3, 4]}.get(family, [])  # the Q-Former
    assert sorted([*parts, *others]) == list(range(len(names)))
    assert all("language" in name or "text" in name for name in language)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = prune(model, sparsity=0.5, criterion="wanda", calibration=batch(family, 2))
    chosen = {names[index] for indices in language.values() for index in indices}
    assert report.layers
    assert all(result.layer.startswith(tuple(f"{name}." for name in chosen)) for result in report.layers)
    pruned = {f"{result.layer}.weight" for result in report.layers}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name not in pruned)


def test_a_block_that_no_output_depends_on_is_left_out_and_reported():
    model = build("llava")
    assert dead_blocks(model, batch("llava", 2), range(6)) == {2: "model.vision_tower.encoder.layers.2"}
    before = model.model.vision_tower.encoder.layers[2].mlp.fc1.weight.clone()
    report = prune(model, sparsity=0.5, criterion="wanda", stacks="all", calibration=batch("llava", 2))
    assert torch.equal(model.model.vision_tower.encoder.layers[2].mlp.fc1.weight, before)
    assert not any("encoder.layers.2" in result.layer for result in report.layers)
    half = 0.5 * sum(x.n for x in report.layers)
    assert sum(x.zeros for x in report.layers) == pytest.approx(half, abs=len(report.layers))
    assert any("layers.2 is left out" in warning for warning in report.warnings)


def test_text_alone_calibrates_the_decoder_but_not_the_tower():
    model, text = build("llava"), {"input_ids": torch.randint(3, 80, (4, 12))}
    prune(model, sparsity=0.5, criterion="wanda", calibration=text)
    with pytest.raises(BillhookError, match=r"vision_tower.*not run with these samples.*give images"):
        prune(model, sparsity=0.5, criterion="wanda", stacks="vision", calibration=text)
    with pytest.raises(BillhookError, match=r"stacks tower names none.*model\.vision_tower\.encoder\.layers"):
        prune(model, sparsity=0.5, criterion="magnitude", stacks="tower")


def test_a_model_that_cannot_be_run_with_the_samples_is_refused_with_the_reason():
    rows = batch("llava", 2) | {"input_ids": torch.randint(3, 80, (2, 12)), "labels": torch.zeros(2, 12).long()}
    with pytest.raises(BillhookError, match=r"cannot run LlavaForConditionalGeneration with these samples: Image"):
        prune(build("llava"), sparsity=0.5, criterion="wanda", calibration=rows)


@pytest.mark.nightly
@pytest.mark.parametrize("family", list(multimodal_families.CONFIGS))
@pytest.mark.parametrize("recipe", ["good", "best", "gblm", "alphapruning", "atp", "owl"])
def test_every_recipe_meets_the_budget_on_all_stacks_of_every_architecture(family, recipe):
    several = [batch(family, 1, seed) for seed in range(10)]
    report = prune(build(family), sparsity=0.5, recipe=recipe, stacks="all", calibration=several)
    assert abs(sum(x.zeros for x in report.layers) - 0.5 * sum(x.n for x in report.layers)) <= len(report.layers)


def test_each_stack_meets_the_sparsity_or_all_share_it():
    zeros = {}
    for budget in ("each", "joint"):
        about = {"sparsity": 0.6, "criterion": "wanda", "allocator": "owl", "stacks": "all", "budget": budget}
        report = prune(build("qwen3_vl"), calibration=[batch("qwen3_vl", 1, seed) for seed in range(4)], **about)
        for stack in ("visual", "language_model"):
            inside = [x for x in report.layers if stack in x.layer]
            zeros[budget, stack] = sum(x.zeros for x in inside) / sum(x.n for x in inside)
    assert zeros["each", "visual"] == pytest.approx(0.6, abs=1e-3)
    assert zeros["each", "language_model"] == pytest.approx(0.6, abs=1e-3)
    assert abs(zeros["joint", "visual"] - zeros["joint", "language_model"]) > 0.01


def test_statistics_of_blocks_that_text_alone_does_not_reach_are_refused_by_name():
    model, text = build("llava"), {"input_ids": batch("llava", 2)["input_ids"][:, -8:]}
    tower = [layer for layer in find_layers(model) if layer.name.startswith("model.vision_tower")]
    given = {"batches": text, "layers": [layer for layer in find_layers(model) if layer not in tower]}
    assert measure(model, "wanda_mean", **given).rows
    with pytest.raises(BillhookError, match=r"^model\.vision_tower\.encoder\.layers\.0 is not run with these samples"):
        measure(model, "wanda_mean", batches=text)
    before = [layer.weight.clone() for layer in tower]
    with pytest.raises(BillhookError, match="is not run with these samples"):
        prune_(model, allocate(measure(model, []), 0.5), criterion="wanda", batches=text)
    assert all(torch.equal(layer.weight, old) for layer, old in zip(tower, before, strict=True))
