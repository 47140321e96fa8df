"""Names and shapes are compared before a value is read; tensors that nothing uses do no harm."""

import json
from pathlib import Path

import bert
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from billhook import BillhookError, load_model, prune
from billhook.engine.streaming import open_streamed
from billhook.steps.quantize import quantize
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


@pytest.mark.parametrize("wrapped", ["model.layers.0", "model", "self_attn"])
@pytest.mark.parametrize("part", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_a_part_that_a_wrapper_of_modules_puts_into_names_is_named(part, wrapped, tmp_path):
    model = changed(tmp_path / "m", lambda w: {k.replace(f"{wrapped}.", f"{wrapped}.{part}."): v for k, v in w.items()})
    for opening in (load_model, open_streamed):
        with pytest.raises(BillhookError, match=f"have the part '{part}'.*take it out of the names"):
            opening(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", [f"{LAST}mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_codes_without_a_configuration_are_refused_before_anything_is_loaded(name, dtype, tmp_path):
    model = changed(tmp_path / "m", lambda weights: weights | {name: (weights[name] * 100).to(dtype)})
    for opening in (load_model, open_streamed):
        with pytest.raises(BillhookError, match=rf"{name} holds (I8|U8|BOOL), which are codes of a quantized model"):
            opening(model)


@pytest.mark.parametrize("content", ["[1]", '{"do_sample": true, "max_new_tokens": "x"}'])
def test_a_generation_configuration_that_stops_the_output_from_opening_is_named(content, tmp_path):
    model = tiny.save(tmp_path / "m", words=False)
    (model / "generation_config.json").write_text(content)
    for opening in (load_model, open_streamed):
        with pytest.raises(BillhookError, match=r"cannot load .*generation_config.json.*Repair or remove it"):
            opening(model)
    (model / "generation_config.json").write_text("{")  # `transformers` ignores it
    assert prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out").sparsity == 0.5
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("beside", ["index", "adapter"])
def test_weights_that_a_file_beside_them_hides_from_transformers_are_read(beside, tmp_path):
    model = tiny.save(tmp_path / "m", words=False, shard="50kB" if beside == "index" else "1GB")
    expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
    if beside == "index":
        index = model / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    else:
        (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    for dtype in ("float32", "bfloat16"):
        found = load_model(model, dtype=dtype).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in expected.items())
        assert {value.dtype for value in found.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.norm.weight": torch.ones(3)}, "model.norm.weight has another shape"),
        (lambda w: {k: v for k, v in w.items() if "1.mlp.up" not in k}, "layers.1.mlp.up_proj.weight is missing"),
        (lambda w: w | next_layer(w), "layers.2.input_layernorm.weight has no place in the model"),
        (lambda w: w | {f"{LAST}self_attn.q_proj.bias": torch.ones(32)}, "q_proj.bias has no place in the model"),
        (lambda w: w | {f"{LAST}self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}, "lora_A.weight has no place"),
        (lambda w: w | {f"{LAST}self_attn.q_norm.weight": torch.ones(8)}, "q_norm.weight has no place in the model"),
        (lambda w: w | {"lm_head.bias": torch.ones(258)}, "lm_head.bias has no place in the model"),
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
    "heads": lambda w: {"v_head.summary.weight": torch.ones(1, 32), "score.weight": torch.ones(2, 32)},
    "towers": lambda w: {"visual.blocks.0.attn.qkv.weight": torch.ones(4, 4), "model.visual.norm.bias": torch.ones(4)},
    "profiles": lambda w: {f"{LAST}mlp.up_proj.total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
    "states": lambda w: {
        f"{LAST}mlp.up_proj._extra_state": torch.zeros(3, dtype=torch.uint8),
        "model.rotary_emb.original_inv_freq": torch.ones(4),
    },
    "empty": lambda w: {f"{LAST}mlp.up_proj.{name}": torch.empty(0, 3) for name in "ab"},
}
NOTED = ("named", "numbered", "declared", "heads", "towers", "empty")


@pytest.mark.parametrize("kind", LEFT_OVER)
def test_what_the_model_does_not_use_is_accepted_and_copied(kind, tmp_path):
    model = changed(tmp_path / "m", lambda weights: weights | LEFT_OVER[kind](weights))
    if kind == "declared":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    report = prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
    assert sum("not used by LlamaForCausalLM" in warning for warning in report.warnings) == (kind in NOTED)
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


def headed(folder: Path, model, kind: str) -> Path:
    """The checkpoint of a model with another head, to be opened as class `kind`."""
    bert.tokenizer().save_pretrained(tiny.save(folder, model, words=False))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    return folder


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = BertConfig(vocab_size=261, max_position_embeddings=64, **SIZES)
VIT = ViTConfig(image_size=8, patch_size=4, **SIZES)
HEADED = {
    "another head and a pooler": lambda: (BertForPreTraining(BERT), BertForMaskedLM),
    "no pooler, of text": lambda: (BertForMaskedLM(BERT), BertModel),
    "no pooler, of images": lambda: (ViTForImageClassification(VIT), ViTModel),
}


@pytest.mark.gate
@pytest.mark.parametrize("case", HEADED)
def test_checkpoints_of_models_with_another_head_keep_all_their_tensors(case, tmp_path):
    model, kind = HEADED[case]()
    source, out = headed(tmp_path / "m", model, kind.__name__), tmp_path / "out"
    report = prune(source, sparsity=0.5, criterion="magnitude", output=out)
    assert len([text for text in report.warnings if f"not used by {kind.__name__}" in text]) == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layer" in name for name in changed)
    assert verify(out, source=source).ok
    stock = kind.from_pretrained(out).state_dict()
    assert all(torch.equal(value, stock[name]) for name, value in load_model(out).state_dict().items())


def test_a_score_does_not_depend_on_a_pooler_that_is_not_stored(tmp_path):
    models = [load_model(headed(tmp_path / f"{seed}", ViTForImageClassification(VIT), "ViTModel")) for seed in (0, 1)]
    assert all(model.pooler is None for model in models)
    quantize(tmp_path / "0", "int8/16", tmp_path / "bits", quantizer="round")
    assert load_model(tmp_path / "bits", quantized=True).pooler is None
    stored = load_model(headed(tmp_path / "m", ViTModel(VIT), "ViTModel"))
    assert stored.pooler is not None
