"""Gradients block by block are those of a backward pass through the whole model, bit for bit."""

import functools
import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY, build
from tiny import llama
from transformers import PreTrainedModel

from billhook import BillhookError, JobError, find_layers
from billhook.architectures.layers import Layer
from billhook.engine import gradients as engine_gradients
from billhook.engine.resources import Resources
from billhook.methods.statistics import GRADIENTS, REGIONAL
from billhook.tasks.text_generation import TASK

compute_gradients = functools.partial(engine_gradients.compute_gradients, loss=TASK.loss)


Tensor = torch.Tensor


def batches(count: int = 2, size: int = 2, length: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (size, length), generator=generator) for _ in range(count)]


def each_gradient(model: PreTrainedModel, ids: list[Tensor]) -> list[dict[str, Tensor]]:
    """Per sequence, the gradients of every layer from one backward pass through the whole model."""
    layers, found = find_layers(model), []
    for sequence in (s for batch in ids for s in batch.split(1)):
        model.zero_grad()
        model(input_ids=sequence, labels=sequence, use_cache=False).loss.backward()
        found.append({layer.name: of_layer(layer).clone() for layer in layers})
    model.zero_grad()
    return found


def of_layer(layer: Layer) -> Tensor:
    gradient = getattr(layer.module, layer.parameter).grad
    gradient = gradient if layer.expert is None else gradient[layer.expert]
    return gradient.T if layer.transposed else gradient


def slow(statistic: str, gradients: list[Tensor]) -> Tensor:
    """The statistics as sums in a plain loop."""
    scale, half = (100, torch.float16) if "reference" in statistic else (1, torch.float32)
    if "l1" in statistic:
        total = torch.zeros_like(gradients[0], dtype=half)
        for g in gradients:
            total = total + (g * scale).abs().to(half)
        return total.float()
    total = torch.zeros_like(gradients[0])
    for g in gradients:
        total = total + (g * scale) ** 2
    return total.sqrt().to(half).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_a_whole_backward_pass(family: str, tmp_path: Path) -> None:
    model, ids = build(family), batches()
    plain = each_gradient(model, ids)
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    found = compute_gradients(model, ids, "gradient_l1", tmp_path / "g.safetensors")
    assert list(found) == [layer.name for layer in find_layers(model)]
    for name, value in found.items():
        assert torch.equal(value, slow("gradient_l1", [g[name] for g in plain])), name
    assert all(value.grad is None for value in model.parameters())
    assert wanted == {name: value.requires_grad for name, value in model.named_parameters()}
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    "statistic", [name for name in GRADIENTS if name != REGIONAL]
)  # tested with the blocks, in test_refine.py
@pytest.mark.parametrize("spill_gib", [8.0, 0.0, 1e-5])
def test_every_statistic_is_the_same_with_inputs_in_memory_and_on_disk(
    statistic: str, spill_gib: float, tmp_path: Path
) -> None:
    model, ids = llama(), batches(3, 2)
    plain = each_gradient(model, ids)
    found = compute_gradients(
        model, ids, statistic, tmp_path / "g.safetensors", resources=Resources(spill_gib=spill_gib)
    )
    for name, value in found.items():
        assert torch.equal(value, slow(statistic, [g[name] for g in plain])), name
    assert [path.name for path in tmp_path.iterdir()] == ["g.safetensors"]
    assert found.about["samples"] == 6


def test_batch_size_grad_mode_frozen_weights_and_chosen_layers_change_nothing(tmp_path: Path) -> None:
    model, ids = llama(), batches(2, 2)
    all_layers = find_layers(model)
    expected = compute_gradients(model, ids, "gradient_l1", tmp_path / "all.safetensors")
    some = [layer for layer in all_layers if layer.block in (1, 2) and "down" not in layer.name]
    singles = [s for batch in ids for s in batch.split(1)]
    model.requires_grad_(False)
    seen: list[str] = []
    with torch.no_grad():
        found = compute_gradients(
            model, singles, "gradient_l1", tmp_path / "some.safetensors", layers=some, progress=seen.append
        )
    assert sorted(seen) == sorted(found) == sorted(layer.name for layer in some)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not any(value.requires_grad for value in model.parameters())


def test_the_auxiliary_loss_of_routers_is_left_out(tmp_path: Path) -> None:
    model, ids = build("mixtral"), batches(1, 1)
    expected = compute_gradients(model, ids, "gradient_l1", tmp_path / "a.safetensors")
    model.config.output_router_logits = True
    found = compute_gradients(model, ids, "gradient_l1", tmp_path / "b.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_float16_gradients_do_not_underflow(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False).half()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-5)  # a nearly flat output: gradients of 1e-7 and less
    ids = batches(1, 2, 64)
    exact = each_gradient(llama_like(model), ids)
    naive = each_gradient(model, ids)
    found = compute_gradients(model, ids, "gradient_l1", tmp_path / "g.safetensors")
    for name, value in found.items():
        expected = slow("gradient_l1", [g[name] for g in exact])
        assert (slow("gradient_l1", [g[name].float() for g in naive]) - expected).norm() > 0.05 * expected.norm(), name
        assert (value - expected).norm() < 0.02 * expected.norm(), name
        assert int((value == 0).sum()) <= value.numel() // 100


def llama_like(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 llama with the same weights."""
    other = llama(tie_word_embeddings=False)
    other.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return other


def test_float16_gradients_that_overflow_start_from_less(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False).half()
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        model.model.layers[2].mlp.down_proj.weight.mul_(30)
    ids = batches(1, 1, 64)
    exact = each_gradient(llama_like(model), ids)
    found = compute_gradients(model, ids, "gradient_l1", tmp_path / "g.safetensors")
    for name, value in found.items():
        expected = slow("gradient_l1", [g[name] for g in exact])
        assert (value - expected).norm() < 0.1 * expected.norm(), name


def test_gradients_of_bfloat16_models_are_finite(tmp_path: Path) -> None:
    found = compute_gradients(llama().bfloat16(), batches(), "gradient_l2", tmp_path / "g.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() and value.any() for value in found.values())


def test_gradients_that_are_not_finite_name_their_layer(tmp_path: Path) -> None:
    model, ids = llama(tie_word_embeddings=False), batches()
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    with pytest.raises(JobError, match=r"gradients of model\.layers\.2\.self_attn\.q_proj hold NaN or infinity"):
        compute_gradients(model, ids, "gradient_l1", tmp_path / "g.safetensors")
    assert not list(tmp_path.iterdir())
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0] = math.nan
    with pytest.raises(JobError, match=r"output of model\.layers\.1 holds NaN"):
        compute_gradients(model, ids, "gradient_l1", tmp_path / "g.safetensors", resources=Resources(spill_gib=0))
    assert not list(tmp_path.iterdir())


def test_unusable_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match="Unknown statistic 'gradient_l3'"):
        compute_gradients(llama(), batches(), "gradient_l3", tmp_path / "g.safetensors")
    with pytest.raises(BillhookError, match="with calibration=SOURCE"):
        compute_gradients(llama(), [], "gradient_l1", tmp_path / "g.safetensors")
    with pytest.raises(BillhookError, match="does not exist"):
        compute_gradients(llama(), batches(), "gradient_l1", tmp_path / "no" / "g.safetensors")
