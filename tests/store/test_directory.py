"""What is saved has the layout of the source, and a record of where everything is."""

import json
import os
from pathlib import Path

import bert
import pytest
import tiny
import torch
from command import contents
from families import FAMILIES, build
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from sparse_models import prune_with_record
from transformers import AutoModelForCausalLM

import billhook
from billhook.errors import JobError
from billhook.steps.export import export_dense
from billhook.steps.slim import slim
from billhook.steps.verify import verify
from billhook.store import checkpoint
from billhook.store.checkpoint import load_tokenizer, quiet
from billhook.store.compute import stored_dtype
from billhook.store.directory import copied_from, save_pruned
from billhook.store.shards import INDEX
from billhook.tasks.opening import load_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source") / "model", dtype=torch.bfloat16, shard="60KB")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_byte_for_byte_and_pruned_with_the_same_logits(family, tmp_path):
    with quiet():
        build(family).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    model = load_model(tmp_path / "model", dtype="bfloat16")
    saved = save_pruned(model, tmp_path / "model", tmp_path / "same")
    assert saved.note is None
    assert contents(tmp_path / "same") == contents(tmp_path / "model")
    record = prune_with_record(model)
    saved = save_pruned(model, tmp_path / "model", tmp_path / "pruned", record=record)
    assert saved.note is None
    assert not verify(tmp_path / "pruned").problems
    ids = torch.arange(2, 26).view(2, 12)
    with torch.inference_mode(), quiet():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", experts_implementation="eager")
        assert again.dtype == torch.bfloat16
        assert torch.equal(model(ids).logits, again(ids).logits)
    tied = again.config.tie_word_embeddings
    assert tied == (again.get_input_embeddings().weight.data_ptr() == again.get_output_embeddings().weight.data_ptr())


def test_a_float32_run_of_a_bfloat16_checkpoint_writes_bfloat16(source, tmp_path):
    save_pruned(load_model(source, dtype="float32"), source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tensor_names_without_the_prefix_of_the_model_stay_so(family, tmp_path):
    """As the checkpoints of GPT-2 have been since 2019."""
    with quiet():
        build(family).save_pretrained(tmp_path / "model")
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    weights = load_file(tmp_path / "model/model.safetensors")
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "model")
    record = prune_with_record(model)
    assert save_pruned(model, tmp_path / "model", tmp_path / "out", record=record).note is None
    assert load_file(tmp_path / "out/model.safetensors").keys() == weights.keys()
    assert verify(tmp_path / "out").ok


def test_tensors_that_the_model_does_not_have_are_kept(tmp_path):
    model = tiny.save(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)  # as old Llama checkpoints have
    save_file(weights, model / "model.safetensors")
    save_pruned(load_model(model), model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


def test_a_layout_that_cannot_be_kept_is_replaced_with_a_note(tmp_path, monkeypatch):
    source = tiny.save(tmp_path / "model", dtype=torch.bfloat16, shard="60KB")
    model = load_model(source, dtype="float32")
    record = prune_with_record(model)
    monkeypatch.setattr("billhook.store.sinks.SameLayout.mismatch", lambda sink: "made up")
    saved = save_pruned(model, source, tmp_path / "out", record=record)
    assert "made up" in saved.note
    assert verify(tmp_path / "out").ok
    again = load_model(tmp_path / "out", dtype="bfloat16")
    assert stored_dtype(tmp_path / "out") == torch.bfloat16
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16())


def test_a_model_built_in_memory_has_no_source(tmp_path):
    model = tiny.mixtral()
    record = prune_with_record(model)
    saved = save_pruned(model, None, tmp_path / "out", record=record)
    assert saved.note is None
    assert verify(tmp_path / "out").ok


def test_everything_else_is_copied_except_weights_and_an_old_record(tmp_path):
    source = tiny.save(tmp_path / "model")
    (source / "LICENSE").write_text("do as you like")
    (source / "modeling_own.py").write_text("x = 1")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    for name in (
        "billhook.json",
        "pytorch_model.bin",
        "model.onnx",
        ".hidden",
        "tf_model.h5",
        "pytorch_model.bin.index.json",
    ):
        (source / name).write_text("{}")
    saved = save_pruned(load_model(source), source, tmp_path / "out")
    out = contents(tmp_path / "out")
    assert {
        "LICENSE",
        "modeling_own.py",
        "additional_chat_templates/tool.jinja",
        "tokenizer.json",
    } <= out.keys()
    assert (
        not {
            "billhook.json",
            "pytorch_model.bin",
            "model.onnx",
            ".hidden",
            "tf_model.h5",
            "pytorch_model.bin.index.json",
        }
        & out.keys()
    )
    assert saved.files.keys() == out.keys() - {"README.md"}  # the card changes when evaluations are added
    assert load_tokenizer(tmp_path / "out") is not None


def test_values_beyond_the_dtype_on_disk_are_an_error(tmp_path):
    source = tiny.save(tmp_path / "model", dtype=torch.float16)
    model = load_model(source, dtype="float32")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(JobError, match=r"model.layers.1.mlp.up_proj.weight holds values that do not fit F16"):
        save_pruned(model, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_become_zero_on_disk_are_counted_and_noted(tmp_path):
    source = tiny.save(tmp_path / "model", dtype=torch.float16)
    model = load_model(source, dtype="float32")
    record = prune_with_record(model)
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach()
    row, column = weight.nonzero()[0].tolist()
    weight[row, column] = 1e-9
    out = save_pruned(model, source, tmp_path / "out", record=record).path
    written = json.loads((out / "billhook.json").read_text())["layers"][name]
    assert written["zeros"] == record["layers"][name]["zeros"] + 1
    assert written["notes"] == ["1 weights became zero in the dtype on disk"]
    assert verify(out).ok


def test_zeros_that_did_not_reach_the_disk_are_an_error(source, tmp_path):
    model = load_model(source)
    record = prune_with_record(model)
    record["layers"]["model.layers.0.mlp.up_proj"]["zeros"] += 1
    with pytest.raises(
        JobError, match=r"model.layers.0.mlp.up_proj has 1024 zeros in the files written where the model has 1025"
    ):
        save_pruned(model, source, tmp_path / "out", record=record)
    assert os.listdir(tmp_path) == []


def test_experts_are_found_on_disk_piece_by_piece(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.mixtral())
    model = load_model(source)
    out = save_pruned(model, source, tmp_path / "out", record=prune_with_record(model, pattern="2:4")).path
    layers = json.loads((out / "billhook.json").read_text())["layers"]
    pieces = layers["model.layers.1.mlp.experts.gate_up_proj.3"]["pieces"]
    assert [piece["tensor"].rpartition("experts.")[2] for piece in pieces] == ["3.w1.weight", "3.w3.weight"]
    assert (
        layers["model.layers.1.mlp.experts.down_proj.2"]["tensor"]
        == "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    )
    assert verify(out).ok


@pytest.mark.parametrize("metadata", [{}, {"metadata": None}, {"metadata": []}], ids=str)
def test_side_files_that_would_stop_the_output_from_loading_are_changed(metadata, tmp_path: Path):
    source, output = tmp_path / "source", tmp_path / "output"
    tiny.llama().save_pretrained(source, max_shard_size="50kB")
    index = json.loads((source / INDEX).read_text())
    del index["metadata"]
    index |= metadata
    (source / INDEX).write_text(json.dumps(index))
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    billhook.prune(source, sparsity=0.5, criterion="magnitude", output=output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert sum(int((p == 0).sum()) for p in model.parameters()) > 0
    assert not (output / "adapter_config.json").exists()


def test_a_configuration_with_infinity_is_kept(tmp_path: Path):
    """Mamba 2's limit of time steps is written like this."""
    source = tiny.save(tmp_path / "source", words=False)
    config = json.loads((source / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}
    (source / "config.json").write_text(json.dumps(config | {"transformers_weights": "model.safetensors"}))
    billhook.prune(source, sparsity=0.5, criterion="magnitude", output=tmp_path / "pruned")
    slim(source, 0.2, tmp_path / "slim", units="channels", method="magnitude")
    for name in ("pruned", "slim"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert written["time_step_limit"] == [0.0, float("inf")]
        assert verify(tmp_path / name).ok


MODULES = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "2_Dense"}]
OF_MODULES = ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/a.index.json")
OF_MODEL = ("onnx/model.onnx", "pytorch_model_fsdp_0/__0_0.distcp", "checkpoint-1/model.safetensors")


def with_modules(folder: Path) -> Path:
    """A model in the layout of sentence-transformers, and its weights in other formats and places."""
    source = bert.save(folder)
    (source / "modules.json").write_text(json.dumps(MODULES))
    for name in (*OF_MODULES, *OF_MODEL, "hf_quant_config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    return source


@pytest.mark.gate
def test_weights_of_other_modules_are_copied_and_those_of_the_model_are_not(tmp_path: Path):
    source, out = with_modules(tmp_path / "model"), tmp_path / "out"
    billhook.prune(source, sparsity=0.5, criterion="magnitude", output=out)
    assert {"modules.json", *OF_MODULES} <= contents(out).keys()
    assert not {*OF_MODEL, "hf_quant_config.json"} & contents(out).keys()
    assert verify(out, source=source).ok
    report = billhook.pack(out, tmp_path / "packed")
    assert not report.notes
    billhook.unpack(report.output, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)
    export_dense(out, tmp_path / "dense")
    assert set(OF_MODULES) <= contents(tmp_path / "dense").keys()


TOGETHER = (  # files of other formats that only work together
    ("openvino/openvino_model.xml", "openvino/openvino_model.bin"),
    ("openvino_tokenizer.xml", "openvino_tokenizer.bin"),
    ("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx_data_1", "onnx/model.onnx.data", "onnx/m.onnx.data.1"),
    ("saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"),
    ("model.ckpt.meta", "model.ckpt.index", "model.ckpt.data-00000-of-00002"),
    ("m.mlpackage/Manifest.json", "m.mlpackage/Data/com.apple.CoreML/weights/weight.bin"),
)


@pytest.mark.parametrize("modules", [False, True])
def test_what_only_works_together_is_copied_or_left_out_together(modules: bool, tmp_path: Path, caplog):
    """In folders of other modules it is copied."""
    source, out = tiny.save(tmp_path / "model"), tmp_path / "out"
    names = [f"1_Other/{name}" if modules else name for group in TOGETHER for name in group]
    plain = ["data.xml", "notes/words.index", "1_Other/config.json"]
    for name in (*names, *plain):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_text("{}")
    if modules:
        (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Other"}]))
    save_pruned(load_model(source), source, out)
    assert contents(out).keys() & {*names, *plain} == {*plain, *(names if modules else ())}
    assert (f"left out ({len(names)}): m.mlpackage/" in caplog.text) != modules
    billhook.prune(out, sparsity=0.5, criterion="magnitude", output=tmp_path / "pruned")
    report = billhook.pack(tmp_path / "pruned", tmp_path / "packed")
    assert not report.notes
    assert contents(tmp_path / "packed").keys() >= {*plain}


@pytest.mark.parametrize(
    "name",
    [
        *("notes.onnx.md", "model.onnx.json", "export_to.onnx.py", "model.onnx_data.sha256", "how.onnx_data_1.txt"),
        *("words.data-tables.json", "train.data-00000-of-00002.csv", "my.onnx_database", "a.data-0-of-x"),
    ],
)
def test_a_format_of_weights_in_the_middle_of_a_name_means_nothing(name: str, tmp_path: Path):
    assert copied_from(tmp_path)(Path(name))


@pytest.mark.parametrize("modules", ["", "{", "3", "[3]", '[{"path": 3}]', '[{"path": "/"}, {"path": ".."}]'])
def test_modules_in_another_form_mean_nothing(modules: str, tmp_path: Path):
    (tmp_path / "modules.json").write_text(modules)
    copied = copied_from(tmp_path)
    assert not copied(Path("model.safetensors"))
    assert not copied(Path("2_Dense/model.safetensors"))


def test_what_is_downloaded_includes_the_folders_of_modules():
    names = [
        *OF_MODULES[:3],
        "config.json",
        "model.safetensors",
        "10_Dense/pytorch_model.bin",
        *OF_MODEL,
        "4bit/model.safetensors",
        "16bit/model.safetensors",
        "original/a.json",
    ]
    kept = filter_repo_objects(names, allow_patterns=checkpoint._DOWNLOADED, ignore_patterns=checkpoint._IGNORED)
    assert list(kept) == [*OF_MODULES[:3], "config.json", "model.safetensors", "10_Dense/pytorch_model.bin"]
