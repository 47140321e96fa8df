"""billhook.json keeps every step that was done to a model; verification checks the whole chain, and finds where it is
broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import build
from paths import DATA
from safetensors.torch import load_file, save_file

from billhook import pack, prune, unpack, verify
from billhook.errors import BillhookError
from billhook.reports.report import load_report
from billhook.store.checkpoint import model_digest, quiet
from billhook.store.files import sha256, write_json
from billhook.store.layout import CARD, PAGE, RECORD
from billhook.store.record import REFILLED, Step, append_step, history, read_record, weights_digest

VERSION_1 = DATA / "version_1"
MLP = ["re:.*mlp.*"]
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


def pruned(source: Path, output: Path, sparsity: float = 0.5, criterion: str = "magnitude", **fields: Any) -> Path:
    made = prune(source, sparsity=sparsity, criterion=criterion, output=output, **fields).output
    assert made is not None
    return made


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "dense", tiny.llama(num_hidden_layers=2), shard="60KB")


@pytest.fixture
def twice(dense: Path, tmp_path: Path) -> Path:
    """All layers to 30 %, then those of the MLPs to 60 %."""
    once = pruned(dense, tmp_path / "once", 0.3)
    return pruned(once, tmp_path / "twice", 0.6, targets=MLP)


def edit(directory: Path, change: Any) -> None:
    record = json.loads((directory / RECORD).read_text())
    change(record)
    write_json(directory / RECORD, record)


def set_weights(directory: Path, layer: str, zeros: int) -> None:
    """Give a layer on disk this number of zeros, and let the record say so of the files and the layer."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    file = directory / index[f"{layer}.weight"]
    tensors = load_file(file)
    values = torch.ones_like(tensors[f"{layer}.weight"]).flatten()
    values[:zeros] = 0
    tensors[f"{layer}.weight"] = values.view_as(tensors[f"{layer}.weight"])
    save_file(tensors, file, metadata={"format": "pt"})

    def note(record: dict[str, Any]) -> None:
        record["layers"][layer]["zeros"] = zeros
        record["files"][file.name] = sha256(file)
        record["steps"][-1]["result"] = weights_digest(record["files"])

    edit(directory, note)


def as_version_1(directory: Path) -> None:
    """The record of one step in the form of version 1."""
    record = json.loads((directory / RECORD).read_text())
    (step,) = record["steps"]
    plan = {"version": 1, "target": step["plan"]["budget"]["sparsity"], "pattern": "unstructured"}
    plan |= {"sparsity": step["plan"]["weights"], "made_by": step["plan"]["made_by"]}
    old = {"version": 1, "billhook": record["billhook"], "plan": plan, "layers": record["layers"]}
    old |= {"warnings": step["warnings"], "made_by": step["made_by"] | {"model": step["model"]}}
    write_json(directory / RECORD, old | {"files": record["files"]})


def test_a_second_step_is_appended(dense: Path, twice: Path) -> None:
    record = read_record(twice / RECORD)
    first, second = record.steps
    once = twice.parent / "once"
    assert [first] == read_record(once / RECORD).steps
    assert (first.model["name"], first.model["digest"]) == ("dense", model_digest(dense))
    assert (second.model["name"], second.model["digest"]) == ("once", model_digest(once))
    assert (first.result, second.result) == (model_digest(once), model_digest(twice))
    assert (record.layers[Q]["sparsity"], record.layers[UP]["sparsity"]) == (0.3, 0.6)
    assert len(record.layers) == len(first.plan["weights"]) > len(second.plan["weights"])  # type: ignore[index]
    result = verify(twice)
    assert result.problems == []
    assert (result.steps, result.layers) == (2, 14)


def test_report_card_and_page_show_every_step(twice: Path) -> None:
    lines = [
        "prune: 30 % of the weights, 14 layers, unstructured, criterion magnitude, allocation uniform",
        "prune: 60 % of the weights, 6 layers, unstructured, criterion magnitude, allocation uniform",
    ]
    report = load_report(twice)
    assert report["steps"] == lines
    assert report["model"]["name"] == "dense"
    assert len(report["layers"]) == 14
    for number, line in enumerate(lines, start=1):
        assert f"* Step {number}: {line}." in (twice / CARD).read_text()
        assert line in (twice / PAGE).read_text()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_layers_of_earlier_steps_keep_their_places(family: str, tmp_path: Path) -> None:
    """Where they are transposed, or lie in several tensors, on disk."""
    with quiet():
        build(family).save_pretrained(tmp_path / "dense")
    once = pruned(tmp_path / "dense", tmp_path / "once", 0.3)
    layer = next(iter(read_record(once / RECORD).layers))
    twice = pruned(once, tmp_path / "twice", 0.6, targets=[layer])
    before, after = (read_record(path / RECORD).layers for path in (once, twice))
    assert [before[name] for name in before if name != layer] == [after[name] for name in after if name != layer]
    assert verify(twice).problems == []


def test_packed_and_unpacked_models_keep_their_steps(twice: Path) -> None:
    packed = pack(twice, twice.parent / "packed").output
    assert (verify(packed).problems, verify(packed).steps) == ([], 2)
    dense = unpack(packed, twice.parent / "unpacked")
    assert (verify(dense).problems, verify(dense).steps) == ([], 2)
    assert history(dense) == history(twice)


def test_a_record_of_version_1_is_the_first_step(dense: Path, tmp_path: Path) -> None:
    once = pruned(dense, tmp_path / "once", 0.3)
    steps = read_record(once / RECORD).steps
    as_version_1(once)
    assert (verify(once).problems, verify(once).steps) == ([], 1)
    twice = pruned(once, tmp_path / "twice", 0.6)
    first, second = read_record(twice / RECORD).steps
    assert (first.made_by, first.model, first.result) == (steps[0].made_by, steps[0].model, steps[0].result)
    assert second.model["digest"] == first.result
    assert verify(twice).problems == []


def test_records_of_version_1_are_read() -> None:
    """As the program that wrote version 1 wrote them."""
    old = json.loads((VERSION_1 / RECORD).read_text())
    record = read_record(VERSION_1 / RECORD)
    (step,) = record.steps
    assert (step.step, step.plan, step.warnings) == ("prune", old["plan"], old["warnings"])
    assert {**step.made_by, "model": step.model} == old["made_by"]
    assert (record.layers, record.files, step.result) == (old["layers"], old["files"], weights_digest(old["files"]))


# Broken chains


def test_a_model_changed_between_two_steps_is_noted(dense: Path, tmp_path: Path) -> None:
    once = pruned(dense, tmp_path / "once", 0.3)
    index = json.loads((once / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(once / index["model.norm.weight"])
    tensors["model.norm.weight"] += 1
    save_file(tensors, once / index["model.norm.weight"], metadata={"format": "pt"})
    warning = "once was changed after the last step of its billhook.json: its earlier steps may not hold."
    report = prune(once, sparsity=0.6, criterion="magnitude", output=tmp_path / "twice")
    assert report.warnings == [warning]
    assert verify(tmp_path / "twice").problems == [
        "step 2 (prune) did not start from the weights that step 1 (prune) wrote: the model was changed in between."
    ]


def test_layers_filled_between_two_steps_are_noted(dense: Path, tmp_path: Path) -> None:
    """As by training in place: of layers that the second step leaves alone the zeros that are left are recorded."""
    once = pruned(dense, tmp_path / "once", 0.3)
    set_weights(once, Q, 5)
    edit(once, lambda record: record["layers"][Q].update(zeros=307))
    twice = pruned(once, tmp_path / "twice", 0.6, targets=MLP)
    assert read_record(twice / RECORD).layers[Q]["zeros"] == 5
    assert verify(twice).problems == [f"{Q}: 5 zeros on disk, 307 planned."]


def test_verification_finds_files_that_the_last_step_did_not_write(twice: Path) -> None:
    edit(twice, lambda record: record["steps"][-1].update(result="0" * 64))
    assert verify(twice).problems == ["The files in billhook.json are not those that step 2 (prune) wrote."]


def test_digests_that_are_not_known_are_not_compared(twice: Path) -> None:
    edit(twice, lambda record: [step.update(result=None) for step in record["steps"]])
    assert verify(twice).problems == []


def test_verification_finds_lost_zeros_of_an_earlier_step(dense: Path, tmp_path: Path) -> None:
    once = pruned(dense, tmp_path / "once", 0.6)
    twice = pruned(once, tmp_path / "twice", 0.3, targets=MLP)  # removes nothing more
    assert verify(twice).problems == []
    set_weights(twice, UP, 1000)
    set_weights(twice, Q, 600)
    assert verify(twice).problems == [
        f"{Q}: 600 zeros on disk, 615 planned.",
        f"{UP}: 1000 zeros on disk, 1229 planned in step 1 (prune).",
    ]


def test_verification_finds_a_missing_layer_of_an_earlier_step(twice: Path) -> None:
    edit(twice, lambda record: record["layers"].pop(Q))
    (problem,) = verify(twice).problems
    assert "1 of the plan's are not in the model" in problem


def test_zeros_that_a_later_step_filled_are_noted(dense: Path, tmp_path: Path) -> None:
    """ADMM solves for the weights it keeps: asked to remove fewer than are zero, it fills some."""
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    once = pruned(dense, tmp_path / "once", 0.6)
    twice = pruned(once, tmp_path / "twice", 0.2, "admm", calibration=ids)
    record = read_record(twice / RECORD)
    assert record.layers[UP]["zeros"] < 1000
    assert any(note.endswith(REFILLED) for note in record.layers[UP]["notes"])
    assert any(warning.startswith(f"{UP}: ") for warning in record.steps[-1].warnings)
    third = pruned(twice, tmp_path / "third", 0.25)
    for path in (twice, third):
        assert verify(path).problems == []


# What is written


def test_records_are_deterministic_and_name_no_folder(dense: Path, tmp_path: Path) -> None:
    folder = tmp_path / "somebodys" / "texts"
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(tiny.TEXT * 200)
    (folder / "blocks.json").write_text('{"blocks": [0.4, 0.6]}')
    fields = {"calibration": folder / "text.txt", "samples": 2, "length": 32, "file": str(folder / "blocks.json")}
    made = [pruned(dense, tmp_path / name, criterion="wanda", allocator="explicit", **fields) for name in ("a", "b")]
    one, other = ((path / RECORD).read_bytes() for path in made)
    assert one == other
    (step,) = read_record(made[0] / RECORD).steps
    assert step.made_by["calibration"]["source"] == "text.txt"
    assert step.plan["made_by"]["options"] == {"file": "blocks.json"}  # type: ignore[index]
    for path in made[0].iterdir():
        assert b"somebodys" not in path.read_bytes(), path


def test_a_damaged_record_is_refused_before_anything_is_written(dense: Path, tmp_path: Path) -> None:
    (dense / RECORD).write_text('{"version": 9}')
    with pytest.raises(BillhookError, match=r"billhook\.json is not a record of version 1 or 2 \(found 9\)"):
        pruned(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_appending_changes_only_the_layers_that_are_given() -> None:
    first = append_step(None, Step("prune", None, {}, {}), {"a": {"zeros": 1}, "b": {"zeros": 2}})
    second = append_step(first, Step("quantize", None, {}, {}), {"b": {"zeros": 3}, "c": {"zeros": 4}})
    assert [step.step for step in second.steps] == ["prune", "quantize"]
    assert second.layers == {"a": {"zeros": 1}, "b": {"zeros": 3}, "c": {"zeros": 4}}
    assert first.layers == {"a": {"zeros": 1}, "b": {"zeros": 2}}
    assert second.files == {}
    assert second.to_json()["version"] == 2
