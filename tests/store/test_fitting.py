"""Names and shapes are compared before a value is read; tensors that nothing uses do no harm."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from billhook import BillhookError, load_model, prune
from billhook.engine.streaming import open_streamed
from billhook.steps.verify import verify

LAST = "model.layers.1."


def changed(folder: Path, change, model=None) -> Path:
    """A model directory with changed tensors."""
    tiny.save(folder, tiny.llama(num_hidden_layers=2) if model is None else model, words=False)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def next_layer(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer after the last one."""
    return {name.replace(".1.", ".2."): value.clone() for name, value in weights.items() if name.startswith(LAST)}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "base_model.model."])
@pytest.mark.parametrize("kind", [tiny.llama, tiny.mixtral])
def test_a_prefix_of_all_names_is_named_before_anything_is_loaded(prefix, kind, tmp_path, monkeypatch):
    model = changed(tmp_path / "m", lambda weights: {prefix + name: value for name, value in weights.items()}, kind())
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for opening in (load_model, open_streamed):
        with pytest.raises(BillhookError, match=f"All tensors of .*m have the prefix '{prefix}'.*take the prefix off"):
            opening(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.norm.weight": torch.ones(3)}, "model.norm.weight has another shape"),
        (lambda w: {k: v for k, v in w.items() if "1.mlp.up" not in k}, "layers.1.mlp.up_proj.weight is missing"),
        (lambda w: w | next_layer(w), "layers.2.input_layernorm.weight has no place in the model"),
        (lambda w: w | {f"{LAST}self_attn.q_proj.bias": torch.ones(32)}, "q_proj.bias has no place in the model"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_loaded(change, message, tmp_path, monkeypatch):
    model = changed(tmp_path / "m", change)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for opening in (load_model, open_streamed):
        with pytest.raises(BillhookError, match=message):
            opening(model)


LEFT_OVER = {
    "buffers": lambda w: {
        f"{LAST}self_attn.rotary_emb.inv_freq": torch.ones(4),
        f"{LAST}attn.masked_bias": torch.ones(1),
    },
    "scales": lambda w: {f"{LAST}self_attn.k_scale": torch.ones(1), f"{LAST}self_attn.v_scale": torch.ones(1)},
    "named": lambda w: {"mtp.fc.weight": torch.ones(4, 4), "model.mtp_layers.0.norm.weight": torch.ones(4)},
    "numbered": lambda w: next_layer(w) | {"model.layers.2.eh_proj.weight": torch.ones(4, 8)},
    "declared": next_layer,
}


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_what_the_model_does_not_use_is_accepted_and_copied(kind, tmp_path):
    model = changed(tmp_path / "m", lambda weights: weights | LEFT_OVER[kind](weights))
    if kind == "declared":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert before.keys() == after.keys()
    left = LEFT_OVER[kind](before).keys()
    assert len(left) > 1
    assert all(torch.equal(before[name], after[name]) for name in left)
    assert verify(tmp_path / "out", source=model).ok
    load_model(model)


def test_the_causal_masks_in_old_files_of_gpt2_are_accepted(tmp_path):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in (0, 1)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in (0, 1)}
    model = changed(tmp_path / "m", lambda weights: weights | masks, gpt2)
    assert open_streamed(model).model.config.n_layer == len(load_model(model).transformer.h) == 2
