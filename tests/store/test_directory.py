"""Saving: the layout of the source, nothing half written whatever happens, and the record of where everything is."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from families import FAMILIES, build
from safetensors.torch import load_file, save_file
from sparse_models import prune_with_record
from transformers import AutoModelForCausalLM

import billhook
import billhook.store.directory as save
import billhook.store.sinks as sinks
from billhook.errors import BillhookError, JobError
from billhook.steps.verify import verify
from billhook.store.checkpoint import load_tokenizer, quiet
from billhook.store.directory import save_pruned
from billhook.store.output import check_output
from billhook.store.shards import INDEX
from billhook.tasks.opening import load_model


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source") / "model", dtype=torch.bfloat16, shard="60KB")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_byte_for_byte_and_pruned_with_the_same_logits(family, tmp_path):
    with quiet():
        build(family).to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    model = load_model(tmp_path / "model")
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
def test_names_without_the_prefix_of_the_model_stay_without_it(family, tmp_path):
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


def test_a_layout_that_cannot_be_kept_is_replaced_and_said(tmp_path, monkeypatch):
    source = tiny.save(tmp_path / "model", dtype=torch.bfloat16, shard="60KB")
    model = load_model(source, dtype="float32")
    record = prune_with_record(model)
    monkeypatch.setattr("billhook.store.sinks.SameLayout.mismatch", lambda sink: "made up")
    saved = save_pruned(model, source, tmp_path / "out", record=record)
    assert "made up" in saved.note
    assert verify(tmp_path / "out").ok
    again = load_model(tmp_path / "out")
    assert again.dtype == torch.bfloat16
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


def test_the_output_has_ordinary_permissions(source, tmp_path):
    out = save_pruned(load_model(source), source, tmp_path / "out").path
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_directory_is_taken(source, tmp_path):
    (tmp_path / "out").mkdir()
    save_pruned(load_model(source), source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_a_directory_with_something_in_it_is_replaced_only_when_told(source, tmp_path):
    model = load_model(source)
    out = save_pruned(model, source, tmp_path / "out").path
    (out / "old").write_text("x")
    with pytest.raises(BillhookError, match=r"exists and is not empty.*--overwrite"):
        save_pruned(model, source, out)
    assert (out / "old").exists()
    save_pruned(model, source, out, overwrite=True)
    assert contents(out) == contents(source)
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_that_is_no_model_is_never_replaced(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BillhookError, match="not a model directory"):
        check_output(tmp_path, source, overwrite=True)


def test_impossible_outputs(source, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BillhookError, match="is a file"):
        check_output(tmp_path / "file", source)
    with pytest.raises(BillhookError, match=r"the folder .* does not exist"):
        check_output(tmp_path / "a/b", source)
    for output in (source, source / "out", source.parent):
        with pytest.raises(BillhookError, match="or is inside it"):
            check_output(output, source, overwrite=True)
    with pytest.raises(JobError, match=r"too full: \d+\.\d+ GiB needed, \d+\.\d+ [GM]iB free"):
        check_output(tmp_path / "out", source, needed=1 << 60)


def fail_at(monkeypatch, module, name: str, error: BaseException, after: int = 0) -> None:
    """Let the function raise `error` from its call number `after` on."""
    real, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) > after:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where",
    [
        (sinks, "put", 1),
        (sinks, "lay_out", 1),
        (shutil, "copyfile", 2),
        (save, "write_json", 0),
        (os, "rename", 0),
        (os, "fsync", 1),
    ],
)
@pytest.mark.parametrize(
    "error", [FULL, KeyboardInterrupt(), RuntimeError("a bug")], ids=["full disk", "ctrl-c", "bug"]
)
def test_a_failure_anywhere_leaves_nothing(source, tmp_path, monkeypatch, where, error):
    model = load_model(source)
    record = prune_with_record(model)
    module, name, after = where
    fail_at(monkeypatch, module, name, error, after)
    expected = JobError if error is FULL else type(error)
    with pytest.raises(expected, match="The disk is full: .* needs .* free" if error is FULL else None):
        save_pruned(model, source, tmp_path / "out", record=record)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full disk", "ctrl-c"])
def test_a_failed_replacement_leaves_the_old_output(source, tmp_path, monkeypatch, error, after):
    model = load_model(source)
    out = save_pruned(model, source, tmp_path / "out").path
    before = contents(out)
    real, calls = os.rename, []

    def rename(*args):
        calls.append(args)
        if len(calls) == after + 1:
            raise error
        real(*args)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises((JobError, KeyboardInterrupt)):
        save_pruned(model, source, out, overwrite=True)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("room", "message"), [(-8192, "too full: .* needed"), (4096, "The disk is full: .* needs")], ids=["seen", "met"]
)
@pytest.mark.parametrize("kept", [True, False], ids=["layout kept", "layout of transformers"])
def test_a_disk_that_is_really_full(source, tmp_path, room, message, kept):
    """Room for less than the weights is seen before anything is written; room for little more is met while writing the
    rest."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors")) + room
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with pytest.raises(JobError, match=message):
            save_pruned(load_model(source), source if kept else None, disk / "out")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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


def test_side_files_that_would_keep_the_output_from_opening(tmp_path: Path):
    source, output = tmp_path / "source", tmp_path / "output"
    tiny.llama().save_pretrained(source, max_shard_size="50kB")
    index = json.loads((source / INDEX).read_text())
    del index["metadata"]
    (source / INDEX).write_text(json.dumps(index))
    (source / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}')
    billhook.prune(source, sparsity=0.5, criterion="magnitude", output=output)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert sum(int((p == 0).sum()) for p in model.parameters()) > 0
    assert not (output / "adapter_config.json").exists()
