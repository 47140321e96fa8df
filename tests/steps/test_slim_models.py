"""Removing units of encoders, image models and models of several parts, and refusals by name."""

import json

import families
import multimodal_families
import pytest
import tiny
import torch
import vision_families
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
)

from billhook.errors import BillhookError
from billhook.plan.plan import Budget, Plan
from billhook.steps.slim import slim
from billhook.steps.verify import verify

pytestmark = pytest.mark.gate
RANDOM = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 96, (4, 12), generator=RANDOM)
PIXELS = {"pixel_values": torch.randn(4, 3, 32, 32, generator=RANDOM)}
_SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_SIZES |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BART = {"vocab_size": 96, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "max_position_embeddings": 64}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 2}
BART = BartConfig(**_BART, encoder_ffn_dim=48, decoder_ffn_dim=48, bos_token_id=1)
MODELS = {
    "bert": (lambda: AutoModel.from_config(BertConfig(**_SIZES)), IDS),
    "dinov2_model": (lambda: AutoModel.from_config(AutoConfig.for_model("dinov2", **dinov2())), PIXELS),
    "bart": (lambda: BartForConditionalGeneration(BART), {"input_ids": IDS, "labels": IDS}),
    "bart_decoder": (lambda: BartForCausalLM(BART), IDS),
    "bloom": (lambda: families.build("bloom"), IDS),
    "llama": (lambda: families.build("llama"), IDS),
    **{
        f: (lambda f=f: multimodal_families.build(f), [multimodal_families.batch(f, 1, n) for n in range(8)])
        for f in ("llava", "gemma3", "glm4v")
    },
    **{f: (lambda f=f: vision_families.build(f), PIXELS) for f in vision_families.CONFIGS},
}


def dinov2() -> dict:
    return vision_families.CONFIGS["dinov2"]


def slimmed(folder, name: str, remove: float | None = 0.34, **given):
    build, calibration = MODELS[name]
    source = tiny.save(folder / "model", build().eval(), words=False)
    return slim(source, remove, folder / "out", **({"calibration": calibration} | given)).output


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bert", {"units": "blocks"}),
        ("dinov2", {"units": "blocks"}),
        ("llama", {"units": "blocks", "method": "taylor"}),
        ("llava", {"units": "channels", "method": "magnitude"}),
        ("vit", {"units": "channels", "method": "magnitude", "calibration": None}),
        pytest.param("dinov2_model", {"units": "heads"}, marks=pytest.mark.nightly),
        pytest.param("clip", {"units": "blocks"}, marks=pytest.mark.nightly),
        pytest.param("beit", {"units": "blocks"}, marks=pytest.mark.nightly),
        pytest.param("bloom", {"units": "blocks"}, marks=pytest.mark.nightly),
        pytest.param("bert", {}, marks=pytest.mark.nightly),
        pytest.param("siglip", {}, marks=pytest.mark.nightly),
    ],
)
def test_what_is_removed_is_written_and_verified(tmp_path, name, given):
    chosen = {"drop_by": "angular"} if given.get("units") == "blocks" else {}
    assert verify(slimmed(tmp_path, name, **chosen, **given)).ok


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bart", r"bart models cannot have fewer blocks: they have several stacks, such as model\.encoder\.layers and"),
        ("bart_decoder", "bart models cannot have fewer blocks: their configuration has no place for it"),
        ("swin", "swin models cannot have fewer blocks: they have several stacks"),
        ("convnext", "convnext models cannot have fewer blocks: they have several stacks"),
        ("hiera", "hiera models cannot have fewer blocks: they have several stacks"),
        ("llava", "llava models cannot have fewer blocks: they have several stacks"),
    ],
)
def test_blocks_that_cannot_go_are_refused_by_name(tmp_path, name, reason):
    with pytest.raises(BillhookError, match=reason):
        slimmed(tmp_path, name, units="blocks")


@pytest.mark.parametrize("given", [{}, {"units": "heads", "remove": 0.1}])
def test_heads_of_stages_are_refused_by_name(tmp_path, given):
    with pytest.raises(BillhookError, match=r"swin models (cannot have fewer|have no)"):
        slimmed(tmp_path, "swin", **given)


def test_each_part_of_a_configuration_has_its_own_numbers(tmp_path):
    towers = {"model.vision_tower.encoder": 32, "model.language_model": 40}
    fixed = {f"{name}.layers.{i}.mlp:channels": n for name, n in towers.items() for i in range(3)}
    out = slimmed(tmp_path, "llava", None, plan=Plan(Budget("parameters", 1), {}, fixed), method="magnitude")
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["intermediate_size"] == 32
    assert config["text_config"]["intermediate_size"] == 40
    assert verify(out).ok


@pytest.mark.parametrize("given", [{"allocator": "owl"}, {"shape": "per-layer"}])
def test_an_allocator_of_blocks_alone_is_refused(tmp_path, given):
    with pytest.raises(BillhookError, match="An allocator and a shape say how much the units of each block lose"):
        slimmed(tmp_path, "llama", units="blocks", **given)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("siglip", r"vision_model\.head\.mlp\.fc1\.weight"),
        ("gemma3", r"model\.vision_tower\.head\.mlp\.fc1\.weight"),
        pytest.param("glm4v", r"model\.visual\.merger\.gate_proj\.weight", marks=pytest.mark.nightly),
    ],
)
def test_a_weight_outside_of_the_blocks_that_would_change_too_is_named(tmp_path, name, tensor):
    with pytest.raises(BillhookError, match=rf"cannot have fewer channels: {tensor}, .* other stacks can be chosen"):
        slimmed(tmp_path, name, 0.1, units="channels", method="magnitude", calibration=None)


@pytest.mark.parametrize(
    ("name", "units"),
    [("gemma3", "channels"), ("llava", "heads"), pytest.param("glm4v", "channels", marks=pytest.mark.nightly)],
)
def test_units_of_the_chosen_stacks_go_and_the_others_keep_their_bytes(tmp_path, name, units):
    out = slimmed(tmp_path, name, 0.1, units=units, stacks="language")
    model, small = (AutoModelForImageTextToText.from_pretrained(tmp_path / x) for x in ("model", "out"))
    before, after = model.state_dict(), small.state_dict()
    changed = [key for key, value in before.items() if value.shape != after[key].shape]
    assert changed
    assert all("language_model" in key for key in changed)
    assert all(torch.equal(value, after[key]) for key, value in before.items() if "vis" in key)
    assert verify(out).ok


BITNET = _SIZES | {"num_key_value_heads": 2}
GEMMA3N = _SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
GEMMA3N |= {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}
GEMMA3N |= {"laurel_rank": 8, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
GEMMA3N |= {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("family", "sizes", "units", "reason"),
    [
        ("bitnet", BITNET, "heads", r"self_attn\.attn_sub_norm is computed over several heads together"),
        ("gemma3n_text", GEMMA3N, "blocks", "cannot have fewer blocks: ValueError: The set of layer types"),
    ],
)
def test_parts_that_the_model_computes_something_else_of_are_refused_by_name(tmp_path, family, sizes, units, reason):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    source = tiny.save(tmp_path / "model", model, words=False)
    with pytest.raises(BillhookError, match=reason):
        slim(source, 0.2, tmp_path / "out", units=units, calibration=IDS)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "with_own_code"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_a_model_with_its_own_code_is_written_with_it(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2), words=False)
    config = json.loads((source / "config.json").read_text()) | {
        "model_type": "with_own_code",
        "architectures": ["Model"],
    }
    config["auto_map"] = {"AutoConfig": "with_own_code.Config", "AutoModelForCausalLM": "with_own_code.Model"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "with_own_code.py").write_text(CODE)
    report = slim(source, 0.2, tmp_path / "out", units="channels", method="magnitude", trust_remote_code=True)
    assert (report.output / "with_own_code.py").read_text() == CODE
    assert AutoModelForCausalLM.from_pretrained(report.output, trust_remote_code=True).config.intermediate_size < 64
    assert verify(report.output).ok
