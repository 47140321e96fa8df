"""Masked adapters: zeros of the merged weights, and files that are an ordinary adapter's."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sparse_models import prune_at_random
from torch import Tensor
from training import train

import billhook
from billhook import BillhookError, JobError, find_layers
from billhook.recovery.masks import count_returned, find_masks

IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))
ALL = "all-linear"


def trained(model: Any, masked: bool = True, steps: int = 3, **options: Any) -> Any:
    """A model of adapters on all linear layers after some steps."""
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 8, "lora_alpha": 16, "target_modules": ALL} | options))
    adapted = get_peft_model(model, billhook.masked_lora(config) if masked else config).train()
    adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        adam.step()
        adam.zero_grad()
    return adapted.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "family, dtype",
    [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32), ("falcon", torch.float32)],
)
def test_a_merged_adapter_keeps_all_zeros_and_computes_the_same(family: str, dtype: torch.dtype) -> None:
    """Merged by peft itself, an ordinary adapter loses them."""
    model = prune_at_random(families.build(family)).to(dtype)
    masks, dense = find_masks(model), logits(model)
    adapted = trained(model)
    before = logits(adapted)
    assert float((before - dense).abs().max()) > 0.1
    merged = billhook.merge_masked(adapted)
    assert torch.equal(logits(merged), before)
    assert not count_returned(merged, masks)
    assert {name for name, _ in merged.named_parameters()} >= masks.keys()
    assert all(torch.equal(merged.get_parameter(name) != 0, mask) for name, mask in masks.items())

    plain = trained(prune_at_random(families.build(family)).to(dtype), masked=False).merge_and_unload()
    assert sum(count_returned(plain, masks).values()) > 0.9 * sum(int((~mask).sum()) for mask in masks.values())


def test_what_is_merged_is_the_masked_product() -> None:
    """Weight by weight, from the factors in the adapter's file."""
    model = prune_at_random(tiny.llama())
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapted = trained(model)
    factors = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_" in n}
    merged = billhook.merge_masked(adapted)
    for layer in find_layers(merged):
        a, b = (factors[f"base_model.model.{layer.name}.lora_{x}.default.weight"] for x in "AB")
        before = weights[f"{layer.name}.weight"]
        assert torch.equal(layer.weight, before + torch.where(before == 0, 0.0, b @ a * 2))


def test_a_saved_adapter_is_an_ordinary_one(tmp_path: Path) -> None:
    """It is loaded masked, is the same again, and its files are those of an adapter that peft made itself."""
    adapted, plain = trained(prune_at_random(tiny.llama())), trained(prune_at_random(tiny.llama()), masked=False)
    adapted.save_pretrained(tmp_path / "masked")
    plain.save_pretrained(tmp_path / "plain")
    names = [sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("masked", "plain")]
    assert names[0] == names[1]
    texts = [(tmp_path / kind / "adapter_config.json").read_text(encoding="utf-8") for kind in ("masked", "plain")]
    assert texts[0] == texts[1]
    config = billhook.masked_lora(LoraConfig.from_pretrained(tmp_path / "masked"))
    again = PeftModel.from_pretrained(prune_at_random(tiny.llama()), tmp_path / "masked", config=config)
    assert torch.equal(logits(again), logits(adapted))
    assert torch.equal(logits(billhook.merge_masked(again)), logits(adapted))


def test_masked_adapters_are_trained_by_trainer(tmp_path: Path) -> None:
    """With gradient checkpointing and dropout, which a merged product has no part in."""
    model = prune_at_random(tiny.llama())
    masks = find_masks(model)
    config = billhook.masked_lora(LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))
    adapted = get_peft_model(model, config)
    train(adapted, tmp_path, "adamw_torch", keep=False, gradient_checkpointing=True)
    before = logits(adapted.eval())
    merged = billhook.merge_masked(adapted)
    assert torch.equal(logits(merged), before)
    assert not count_returned(merged, masks)


def test_gradients_of_the_factors_are_those_of_the_masked_product() -> None:
    model = prune_at_random(tiny.llama())
    adapted = trained(model, steps=1, target_modules=["up_proj"]).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    layer = adapted.base_model.model.model.layers[1].mlp.up_proj
    a, b = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
    loss = float(adapted(input_ids=IDS, labels=IDS).loss.detach())
    with torch.no_grad():
        b[3, 2] += 1e-2
        step = float(adapted(input_ids=IDS, labels=IDS).loss) - loss
    assert step == pytest.approx(1e-2 * float(b.grad[3, 2]), rel=0.1)
    assert a.grad.any()


def test_a_callback_says_that_adapters_need_masks_of_their_own(tmp_path: Path) -> None:
    adapted = trained(prune_at_random(tiny.llama()), masked=False, steps=0)
    with pytest.raises(BillhookError, match=r"No weight that holds zeros is trained.*billhook\.masked_lora"):
        train(adapted, tmp_path, "sgd", keep=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_lora_weights": "pissa"}, "'pissa' changes the weights"),
        ({"lora_bias": True}, "leave lora_bias and target_parameters out"),
        ({"use_dora": True}, "not of its variants \\(DoraLinearVariant\\)"),
    ],
    ids=str,
)
def test_options_that_change_zeros_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        trained(prune_at_random(tiny.llama()), **options)


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        (tiny.mixtral, ALL, "not experts in one parameter"),  # of which peft makes target_parameters
        (tiny.llama, ["q_proj", "embed_tokens"], "not Embedding: change target_modules"),
    ],
)
def test_what_is_not_linear_is_refused_before_it_is_trained(model: Any, target: Any, message: str) -> None:
    with pytest.raises(BillhookError, match=f"masked_lora masks linear layers, {message}"):
        trained(prune_at_random(model()), target_modules=target, steps=0)


@pytest.mark.parametrize("kept", [True, False])
def test_whole_layers_that_were_trained_are_merged_if_they_have_their_zeros(kept: bool) -> None:
    model = prune_at_random(tiny.llama())
    masks = find_masks(model)
    adapted = trained(model, target_modules=["q_proj"], modules_to_save=["down_proj"], steps=0).train()
    adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    with billhook.keep_masks(adapted) if kept else nullcontext():
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        adam.step()
    if kept:
        assert not count_returned(billhook.merge_masked(adapted), masks)
    else:
        with pytest.raises(JobError, match=r"down_proj.weight lost \d+ of its zeros .*leave it out of modules_to_save"):
            billhook.merge_masked(adapted)


def test_what_cannot_be_merged_is_refused() -> None:
    model = prune_at_random(tiny.llama())
    with pytest.raises(BillhookError, match="needs a peft model, got LlamaForCausalLM"):
        billhook.merge_masked(model)
    with pytest.raises(BillhookError, match=r"q_proj has an adapter whose product is not masked"):
        billhook.merge_masked(trained(model, masked=False, steps=0))
    with pytest.raises(BillhookError, match=r"The weight of .*lm_head is that of another layer too"):
        billhook.merge_masked(trained(prune_at_random(tiny.llama()), target_modules=["lm_head"], steps=0))
    with pytest.raises(BillhookError, match="masked_lora needs a peft LoraConfig, got dict"):
        billhook.masked_lora({"r": 8})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BillhookError, match=r"LoRA needs the package peft: pip install 'billhook\[lora\]'"):
        billhook.masked_lora(LoraConfig())
