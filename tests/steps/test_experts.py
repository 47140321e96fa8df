"""Experts in GGUF files: every matrix is what was computed, and the experts of a layer share a type."""

import json
from pathlib import Path

import gguf_families
import pytest
import torch
from llamacpp import LlamaCpp, llama_cpp  # noqa: F401
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from billhook.architectures.layers import find_layers
from billhook.errors import BillhookError
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest
from billhook.methods.statistics import LayerStats
from billhook.packed.loading import load
from billhook.steps.compress_units import compress
from billhook.steps.levels import _stand_ins
from billhook.steps.quantize import quantize
from billhook.steps.verify import verify

pytestmark = pytest.mark.gate
IDS = torch.randint(0, gguf_families.VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.nightly)]


def rounded(source: Path, type: str, outside: str) -> dict[str, torch.Tensor]:
    """The weights of a model, all layers rounded to a type, embeddings and head to another."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    embeddings = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    weights = [(layer.weight, type) for layer in find_layers(model)] + [(w.detach(), outside) for w in embeddings]
    for weight, own in weights:
        weight.copy_(nearest(weight.float(), LayerStats(0, 0), grid_of(own)).decode(torch.float32))
    return model.state_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_read_as_what_was_computed_for_every_expert(tmp_path, family):
    source = gguf_families.save(tmp_path / "model", family, num_hidden_layers=1)
    output = quantize(source, "q4_0", tmp_path / "out", quantizer="round").output
    found = load(output / "out.gguf").state_dict()
    for name, value in rounded(source, "q4_0", "q8_0").items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)
    assert verify(output).ok


@pytest.mark.nightly
def test_experts_in_one_tensor_give_the_same_file_as_experts_in_several(tmp_path):
    source = gguf_families.save(tmp_path / "model", "qwen3_moe", num_hidden_layers=1, num_experts=3)
    stacked = gguf_families.save(tmp_path / "stacked", "qwen3_moe", num_hidden_layers=1, num_experts=3)
    weights = load_file(stacked / "model.safetensors")
    experts = {name: weights.pop(name) for name in list(weights) if ".experts." in name}
    prefix, count = "model.layers.0.mlp.experts", len(experts) // 3

    def matrix(kind: str, expert: int) -> torch.Tensor:
        return experts[f"{prefix}.{expert}.{kind}_proj.weight"]

    both = [torch.cat([matrix("gate", e), matrix("up", e)]) for e in range(count)]
    weights[f"{prefix}.gate_up_proj"] = torch.stack(both)
    weights[f"{prefix}.down_proj"] = torch.stack([matrix("down", e) for e in range(count)])
    save_file(weights, stacked / "model.safetensors", metadata={"format": "pt"})
    fields = {"calibration": IDS, "batch_size": 2, "sweeps": 0}
    files = [
        quantize(model, "q4_0", tmp_path / f"out{n}", **fields).output for n, model in enumerate((source, stacked))
    ]
    first, second = (load(file / f"{file.name}.gguf").state_dict() for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert verify(files[1]).ok
    with pytest.raises(BillhookError, match="holds 3 experts: quantize all of them or none"):
        quantize(stacked, "q4_0", tmp_path / "out", ignore=f"{prefix}.down_proj.1", **fields)


def test_the_experts_of_a_layer_get_one_type_and_the_file_opens(tmp_path):
    source = gguf_families.save(tmp_path / "model", "mixtral", num_hidden_layers=1, num_local_experts=3)
    fields = {"calibration": IDS, "batch_size": 2, "sweeps": 0, "types": ["q4_0", "q5_0", "q8_0"]}
    report = compress(source, tmp_path / "out", bits=7.5, **fields)
    assert report.quantized.size <= report.budget
    layers = json.loads((tmp_path / "out" / "billhook.json").read_text())["layers"]
    kinds: dict[str, set[str]] = {}
    for name, facts in layers.items():
        if ".experts." in name:
            kinds.setdefault(name.rpartition(".")[0], set()).add(facts["type"])
    assert len(kinds) == 2
    assert all(len(types) == 1 for types in kinds.values())
    assert verify(tmp_path / "out").ok
    assert load(tmp_path / "out" / "out.gguf")(IDS).logits.isfinite().all()


def test_experts_that_stand_for_others_are_spread_evenly():
    layers = find_layers(gguf_families.build("qwen3_moe", num_hidden_layers=1, num_experts=20))
    stand_ins = _stand_ins(layers)
    assert {name: found for name, found in stand_ins.items() if found == [name]}.keys() == {
        layer.name for layer in layers if layer.expert is None
    }
    prefix = "model.layers.0.mlp.experts.down_proj"
    assert stand_ins[f"{prefix}.5"] == [f"{prefix}.{e}" for e in (0, 3, 6, 9, 12, 15, 18)]


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_llama_cpp_has_the_loss_of_the_weights_that_are_in_the_file(family, llama_cpp: LlamaCpp, tmp_path):  # noqa: F811
    source = gguf_families.save(tmp_path / "model", family)
    output = quantize(source, "q4_0", tmp_path / "out", calibration=IDS, batch_size=2).output
    ids = gguf_families.losses(gguf_families.build(family))[0]
    with torch.no_grad():
        loss = float(load(output / "out.gguf")(input_ids=ids, labels=ids).loss)
    assert llama_cpp.loss(output / "out.gguf", ids.numpy()) == pytest.approx(loss, abs=0.005)
