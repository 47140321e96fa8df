"""Verification finds every difference between a pruned directory and its record, and nothing where there is none."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from sparse_models import prune_with_record

from billhook.errors import BillhookError
from billhook.steps.verify import verify
from billhook.store.directory import save_pruned
from billhook.store.files import sha256
from billhook.store.record import weights_digest
from billhook.store.shards import read_shard
from billhook.tasks.opening import load_model

LAYER = "model.layers.1.mlp.up_proj"


def pruned(folder: Path, pattern: str = "unstructured") -> Path:
    source = tiny.save(folder / "source", dtype=torch.bfloat16, shard="60KB")
    model = load_model(source)
    return save_pruned(model, source, folder / "pruned", record=prune_with_record(model, pattern=pattern)).path


@pytest.fixture(scope="module")
def unstructured(tmp_path_factory) -> Path:
    return pruned(tmp_path_factory.mktemp("unstructured"))


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory) -> Path:
    return pruned(tmp_path_factory.mktemp("two_of_four"), "2:4")


@pytest.fixture
def copy(unstructured, tmp_path) -> Path:
    return Path(shutil.copytree(unstructured, tmp_path / "copy"))


@pytest.fixture
def copy_2_4(two_of_four, tmp_path) -> Path:
    return Path(shutil.copytree(two_of_four, tmp_path / "copy"))


def shard_of(directory: Path, layer: str = LAYER) -> Path:
    return (
        directory
        / json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"][f"{layer}.weight"]
    )


def edit_weight(directory: Path, change) -> None:
    """Change one layer's weight on disk, and what the record says of the file, so that only the counts can tell."""
    edit_tensor(directory, f"{LAYER}.weight", change)


def edit_tensor(directory: Path, name: str, change) -> None:
    shard = shard_of(directory, name.removesuffix(".weight"))
    weights = load_file(shard)
    change(weights[name])
    save_file(weights, shard, metadata={"format": "pt"})

    def note(record: dict) -> None:
        record["files"][shard.name] = sha256(shard)
        record["steps"][-1]["result"] = weights_digest(record["files"])

    edit_record(directory, note)


def edit_record(directory: Path, change) -> None:
    record = json.loads((directory / "billhook.json").read_text())
    change(record)
    (directory / "billhook.json").write_text(json.dumps(record))


def weights(record: dict) -> dict:
    """What the plan of the last step says of each layer."""
    return record["steps"][-1]["plan"]["weights"]


def test_verification_accepts_a_pruned_directory(unstructured):
    calls = []
    result = verify(unstructured, progress=calls.append)
    assert result.ok
    assert result.problems == []
    assert result.layers == 21
    assert result.zeros * 2 == result.weights == 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert len(calls) == 21
    assert "model.layers.2.mlp.down_proj" in calls
    assert result.to_dict()["ok"] is True


def test_n_of_m_groups_are_as_recorded(two_of_four):
    assert verify(two_of_four).ok


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zeros_are_counted_as_torch_counts_them(dtype, tmp_path):
    values = torch.tensor([[0.0, -0.0, 1.0, -1.0], [float("nan"), float("inf"), 1e-30, -1e-7]]).to(dtype)
    save_file({"w": values, "x": torch.ones(3)}, tmp_path / "x.safetensors")
    shard = read_shard(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(shard.zeros(shard.entries["w"]), (values == 0).numpy())


@pytest.mark.parametrize("name", [LAYER + ".weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_verification_finds_values_that_are_not_finite(copy, name, bad):
    """In any tensor, with the record saying that the file is as it was written."""
    edit_tensor(copy, name, lambda w: w.view(-1).__setitem__(int(w.view(-1).nonzero()[-1]), bad))
    assert verify(copy).problems == [f"{name} holds NaN or infinite values."]


def test_verification_needs_a_directory_and_a_record(tmp_path, copy):
    with pytest.raises(BillhookError, match="no directory"):
        verify(tmp_path / "nothing")
    (copy / "billhook.json").unlink()
    with pytest.raises(BillhookError, match=r"no record of a pruned model at .*billhook.json"):
        verify(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=3), r"not a record of version 1 or 2 \(found 3\)"),
        (lambda r: r.update(version=1), "has no 'plan'"),
        (lambda r: r.update(steps=[]), "has no 'steps'"),
        (lambda r: r.update(steps=[7]), "step 1: must be an object, found 7"),
        (lambda r: r["steps"][0].update(plan=7), "step 1, plan: must be an object, found 7"),
        (lambda r: r["steps"][0].update(model=None), "step 1, model: must be an object, found None"),
        (lambda r: r["layers"][LAYER].update(notes="x"), "up_proj, notes: must be a list, found 'x'"),
        (lambda r: r.pop("layers"), "has no 'layers'"),
        (lambda r: r.update(files=[]), "has no 'files'"),
        (lambda r: r["layers"][LAYER].update(shape=[3]), r"shape: must be a list of 2, found \[3\]"),
        (lambda r: r["layers"][LAYER].update(zeros=None), "zeros: must be a whole number"),
        (lambda r: r["layers"].update({LAYER: 3}), "up_proj: must be an object, found 3"),
        (lambda r: r["files"].update({"../../etc/passwd": "0"}), "outside the directory"),
        (lambda r: r["files"].update({"/etc/passwd": "0"}), "outside the directory"),
    ],
)
def test_a_file_that_is_no_record_is_refused(copy, change, message):
    edit_record(copy, change)
    with pytest.raises(BillhookError, match=message):
        verify(copy)


def test_verification_finds_a_refilled_zero(copy):
    edit_weight(copy, lambda w: w.view(-1).__setitem__(int((w.view(-1) == 0).nonzero()[0]), 1.0))
    assert verify(copy).problems == [f"{LAYER}: 1023 zeros on disk, 1024 recorded."]


def test_verification_finds_one_more_removed_weight(copy):
    edit_weight(copy, lambda w: w.view(-1).__setitem__(int(w.view(-1).nonzero()[0]), 0.0))
    assert verify(copy).problems == [f"{LAYER}: 1025 zeros on disk, 1024 recorded."]


def test_verification_finds_a_zero_moved_to_another_group(copy_2_4):
    def move(w: torch.Tensor) -> None:
        row = w[0].view(-1, 4)
        row[0, row[0] == 0] = 1.0
        row[1] = 0.0

    edit_weight(copy_2_4, move)
    assert verify(copy_2_4).problems == [f"{LAYER}: 1 groups of 4 have fewer than 2 zeros."]


def test_verification_finds_a_flipped_bit(copy):
    shard = shard_of(copy)
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert f"{shard.name} is not the file that was written: its SHA-256 differs." in verify(copy).problems


def test_verification_finds_a_truncated_file(copy):
    shard = shard_of(copy)
    shard.write_bytes(shard.read_bytes()[:-7])
    problems = verify(copy).problems
    assert len(problems) == 2
    assert "SHA-256 differs" in problems[0]
    assert "header promises" in problems[1]


def test_a_damaged_header_is_refused(copy):
    shard = shard_of(copy)
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])
    assert any("not a safetensors file" in problem for problem in verify(copy).problems)


def test_verification_finds_a_missing_shard(copy):
    shard_of(copy).unlink()
    problems = verify(copy).problems
    assert f"{shard_of(copy).name} is missing." in problems
    assert any("which is not in" in problem for problem in problems)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_files_that_transformers_would_read_instead_are_found(copy, name):
    save_file({"a": torch.ones(2)}, copy / name)
    (copy / "notes.txt").write_text("no weights")
    found = verify(copy).problems
    assert f"{name} holds weights and is not listed in billhook.json." in found
    assert (len(found) == 1) == (name != "model.safetensors")  # which is read in place of the files of the index


def test_an_index_that_leads_outside_its_directory_is_refused(copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{LAYER}.weight"] = "../outside.safetensors"
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert any("only plain file names" in problem for problem in verify(copy).problems)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "no such model"}'])
def test_verification_finds_a_configuration_that_does_not_load(copy, content):
    (copy / "config.json").write_text(content)
    assert any(problem.startswith("config.json cannot be loaded") for problem in verify(copy).problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: weights(r).update({LAYER: 0.6}), "one was edited"),
        (
            lambda r: (weights(r).update({LAYER: 0.6}), r["layers"][LAYER].update(sparsity=0.6)),
            "1024 zeros on disk, 1229 planned",
        ),
        (
            lambda r: (weights(r).update({LAYER: 0.4}), r["layers"][LAYER].update(sparsity=0.4)),
            "1024 zeros on disk, 819 planned",
        ),
        (lambda r: weights(r).pop(LAYER), "not for this model"),
        (lambda r: weights(r).update({LAYER: "2:4"}), "groups of 4 have fewer than 2 zeros"),
        (lambda r: weights(r).update({LAYER: "2:5"}), "divide by 5"),
        (lambda r: weights(r).update({LAYER: "q4"}), "Unknown storage type"),
        (lambda r: r["steps"][0]["plan"].update(version=9), "not a plan of version"),
        (lambda r: r["layers"][LAYER].update(tensor="nothing"), f"{LAYER}: its weights are not where"),
        (lambda r: r["layers"][LAYER].update(transposed=True), f"{LAYER}: its weights are not where"),
        (
            lambda r: r["layers"][LAYER].update(pieces=[{"tensor": 3, "rows": "all"}]),
            f"{LAYER}: its weights are not where",
        ),
        (
            lambda r: r["layers"][LAYER].update(pieces=[{"tensor": f"{LAYER}.weight", "rows": [None]}]),
            f"{LAYER}: its weights are not where",
        ),
        (lambda r: r["layers"][LAYER].update(index=0), f"{LAYER}: its weights are not where"),
        (lambda r: r["layers"][LAYER].update(zeros=1000), f"{LAYER}: 1024 zeros on disk, 1000 recorded"),
    ],
)
def test_verification_finds_an_edited_record(copy, change, message):
    edit_record(copy, change)
    result = verify(copy)
    assert not result.ok
    assert any(message in problem for problem in result.problems), result.problems


def test_more_zeros_than_planned_need_a_reason(copy):
    def less(record: dict) -> None:
        weights(record)[LAYER] = record["layers"][LAYER]["sparsity"] = 0.4
        record["layers"][LAYER]["notes"] = ["205 more zeros than planned (1000 weights were zero before)"]

    edit_record(copy, less)
    assert verify(copy).ok


def test_zeros_of_layers_without_a_place_are_counted_in_the_loaded_model(copy):
    edit_record(copy, lambda record: [facts.update(tensor=None) for facts in record["layers"].values()])
    assert verify(copy).ok
    edit_weight(copy, lambda w: w.fill_(1.0))
    assert f"{LAYER}: 0 zeros on disk, 1024 recorded." in verify(copy).problems
