"""Exports of quantized models: decoded weights are those that stock programs read, and what has no form is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from command import billhook, done
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from billhook.architectures.layers import find_layers
from billhook.errors import BillhookError, JobError
from billhook.packed.loading import load
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.steps.export import export_dense, export_gguf, export_tensor_types, export_vllm
from billhook.steps.quantize import quantize
from billhook.steps.verify import verify
from billhook.store.gguf_file import read_gguf

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=2, intermediate_size=64)
    return tiny.save(tmp_path_factory.mktemp("source") / "model", model, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def int4(source, tmp_path_factory) -> Path:
    return quantize(source, "int4/16", tmp_path_factory.mktemp("int4") / "int4", quantizer="round").output


def values(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


@pytest.mark.parametrize(("kind", "dtype"), [("auto", torch.bfloat16), ("f16", torch.float16)])
def test_a_decoded_directory_has_the_weights_that_transformers_reads_and_its_history(tmp_path, int4, kind, dtype):
    output = export_dense(int4, tmp_path / "dense", kind=kind).path
    stock = AutoModelForCausalLM.from_pretrained(int4, dtype=torch.float32)
    stock(IDS)  # decodes the weights
    decoded = values(output)
    read = stock.state_dict()
    for name, value in decoded.items():
        assert torch.equal(value, read[name].to(dtype).float()), name
    assert (output / "tokenizer.json").read_bytes() == (int4 / "tokenizer.json").read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert [step["step"] for step in json.loads((output / "billhook.json").read_text())["steps"]] == [
        "quantize",
        "export",
    ]
    assert verify(output).ok
    assert "decoded" in (output / "README.md").read_text()
    again = quantize(output, "int8/16", tmp_path / "again", quantizer="round")  # an ordinary model
    assert verify(again.output).ok


def test_a_gguf_file_is_decoded_in_16_bits_with_history_and_without(tmp_path, source):
    made = quantize(source, "q4_0", tmp_path / "q4", quantizer="round").output
    expected = load(made / "q4.gguf").state_dict()
    shutil.copy(made / "q4.gguf", tmp_path / "stranger.gguf")
    for given in (made, made / "q4.gguf", tmp_path / "stranger.gguf"):
        output = export_dense(given, tmp_path / "dense", overwrite=True).path
        found = values(output)
        for name, value in expected.items():
            assert torch.equal(found[name], value.half().float()), name
        assert {x.dtype for x in load_file(output / "model.safetensors").values()} == {torch.float16}
        if given != tmp_path / "stranger.gguf":
            assert verify(output).ok
        assert (output / "billhook.json").exists() == (given != tmp_path / "stranger.gguf")


def test_a_decoded_directory_becomes_a_gguf_file(tmp_path, int4):
    written = export_gguf(int4, tmp_path / "int4.gguf", kind="f32")
    assert any("decoded" in note for note in written.notes)
    assert read_gguf(tmp_path / "int4.gguf").metadata["general.name"].value.lower() == "int4"
    dense = values(export_dense(int4, tmp_path / "dense", kind="f32").path)
    found = load(tmp_path / "int4.gguf").state_dict()
    assert all(torch.equal(found[name], value) for name, value in dense.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "int4.billhook.json", "int4.gguf"]


def test_vllm_gets_what_it_lists_and_the_rest_is_refused_with_the_reason(tmp_path, source, int4):
    output = export_vllm(int4, tmp_path / "vllm").path
    assert verify(output).ok
    assert all(
        (output / path.name).read_bytes() == path.read_bytes() for path in int4.iterdir() if path.suffix != ".json"
    )
    layers = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "self_attn.k_proj")]
    weights = {name: "int8/16" if name == layers[1] else "int4/16" for name in layers}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"version": 2, "budget": {"bytes": 10**6}, "weights": weights}))
    only = {"targets": layers, "quantizer": "round"}
    mixed = quantize(source, "", tmp_path / "mixed", plan=plan, **only).output
    refused = {
        mixed: "self_attn.v_proj, which differ in type: 16 bits, int4/16, int8/16",
        quantize(source, "int3/16", tmp_path / "int3", **only).output: "4 and 8 bits, and 4 layers, such as model",
        quantize(source, "q4_0", tmp_path / "q4", quantizer="round").output: "is a GGUF file, whose types have no form",
        source: "is not quantized: vLLM reads it as it is",
    }
    for folder, match in refused.items():
        ran = billhook("export", folder, "--to", "vllm", "-o", tmp_path / "none")
        assert ran.code == 2
        assert match in ran.err.replace("\n", " ")
    assert not (tmp_path / "none").exists()


def test_another_format_of_compressed_tensors_is_refused_by_name(tmp_path, int4):
    for key, value in (("format", "float-quantized"), ("config_groups", {"group_0": {"targets": [], "weights": {}}})):
        folder = tmp_path / key
        shutil.copytree(int4, folder)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"][key] = value
        (folder / "config.json").write_text(json.dumps(config))
        ran = billhook("export", folder, "--to", "dense", "-o", tmp_path / "none")
        assert ran.code == 2
        assert "pack-quantized" in ran.err or "is in no group" in ran.err
    assert done("export", int4, "--to", "dense", "-o", tmp_path / "out", "--json").json["types"]["bf16"] > 10


@pytest.mark.gate
def test_a_list_of_types_means_every_tensor_of_a_gguf_file_and_no_other(tmp_path):
    """llama.cpp searches the name of a tensor for the expressions in turn, and the first that is found counts."""
    model = tiny.llama(num_hidden_layers=12, tie_word_embeddings=False)
    source = tiny.save(tmp_path / "model", model)
    types = {"model.layers.1.self_attn.q_proj": "q8_0", "model.layers.11.mlp.up_proj": "q5_0"}
    weights = {x.name: Spec(type=types.get(x.name, "q4_0")) for x in find_layers(model)}
    output = quantize(source, "", tmp_path / "out", plan=Plan(Budget("bytes", 1), weights), quantizer="round").output
    written = export_tensor_types(output, tmp_path / "types.txt")
    lines = [line.rpartition("=") for line in written.path.read_text().splitlines()]
    for tensor in read_gguf(output / "out.gguf").tensors.values():
        found = [type for pattern, _, type in lines if re.search(pattern, tensor.name)]
        assert found == ([tensor.type] if len(tensor.shape) > 1 else [])
    with pytest.raises(BillhookError, match="exists"):
        export_tensor_types(output, tmp_path / "types.txt")
    with pytest.raises(BillhookError, match="holds no GGUF file"):
        export_tensor_types(source, tmp_path / "others.txt")


def test_values_that_are_not_finite_are_not_called_too_large_for_the_type(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    damaged = tiny.save(tmp_path / "model", model, words=False)
    with pytest.raises(JobError, match=r"norm\.weight holds NaN or infinite values: the model is damaged"):
        export_dense(damaged, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_scale_that_is_not_finite_is_damage(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=1), words=False)
    small = quantize(source, "int4/32", tmp_path / "small", quantizer="round").output
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    file = next(file for file in small.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BillhookError, match=r"cannot be decoded .*q_proj\.weight has a scale that is NaN or infinite"):
        export_dense(small, tmp_path / "out")
