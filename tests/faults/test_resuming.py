"""Runs that were stopped after a block: they go on from there with the same result, and only where nothing has changed
meanwhile."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import contents, done
from safetensors.torch import save_file
from trial import (
    GBLM,
    IDS,
    MAGNITUDE,
    SPARSEGPT,
    continued,
    never_mistaken,
    stop_after,
    survived,
)

from billhook import Plan, Table, prune
from billhook.architectures.layers import find_layers
from billhook.errors import BillhookError
from billhook.plan.spec import Pattern
from billhook.plan.table import Row
from billhook.steps.prune_job import PruneRequest
from billhook.steps.state import STATE, finished_items, partial_folder
from billhook.store.shards import read_shard
from billhook.tasks.opening import load_model

pytestmark = [pytest.mark.gate, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.mark.parametrize(("name", "fields"), [("sparsegpt", SPARSEGPT), ("gblm", GBLM)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_stopped_run_is_resumed_after_the_last_finished_block(source, expected, tmp_path, name, fields, blocks):
    stop_after(source, tmp_path / "out", blocks, **fields)
    never_mistaken(tmp_path)
    layers = find_layers(load_model(source))
    assert finished_items(tmp_path / "out", True) == sum(layer.block < blocks for layer in layers)
    assert finished_items(tmp_path / "out", False) == 0
    seen: list[str] = []
    prune(source, output=tmp_path / "out", resume=True, progress=seen.append, **fields)
    assert contents(tmp_path / "out") == expected[name]
    assert os.listdir(tmp_path) == ["out"]


def test_an_unfinished_run_is_resumed_or_replaced_only_on_request(source, tmp_path):
    stop_after(source, tmp_path / "out", 1, **MAGNITUDE)
    with pytest.raises(
        BillhookError,
        match=r"out.partial holds an unfinished run \(1 of 3 blocks\). Continue it with resume=True, or start",
    ):
        prune(source, output=tmp_path / "out", **MAGNITUDE)
    changes = [
        ({"sparsity": 0.6}, "its sparsity was 0.5, now it is 0.6"),
        ({"seed": 3}, "its seed was 0, now it is 3"),
        ({"criterion": "sparsegpt", "calibration": IDS}, "its criterion was 'magnitude', now it is 'sparsegpt'"),
        ({"targets": ["re:.*mlp"]}, "its targets was"),
        ({"dtype": "bfloat16"}, "its dtype was 'float32', now it is 'bfloat16'"),
    ]
    for change, reason in changes:
        with pytest.raises(BillhookError, match=f"cannot be continued: {reason}"):
            prune(source, output=tmp_path / "out", resume=True, **(MAGNITUDE | change))
    other = shutil.copytree(source, tmp_path / "other")
    file = sorted(other.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(BillhookError, match=r"cannot be continued: its model was '.*', now it is '"):
        prune(other, output=tmp_path / "out", resume=True, **MAGNITUDE)
    state = partial_folder(tmp_path / "out") / STATE
    value = json.loads(state.read_text())
    value["identity"]["version"] = "0.0.1"
    state.write_text(json.dumps(value))
    with pytest.raises(BillhookError, match=r"cannot be continued: its version was '0\.0\.1', now it is"):
        prune(source, output=tmp_path / "out", resume=True, **MAGNITUDE)
    prune(source, output=tmp_path / "out", overwrite=True, **MAGNITUDE)
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_every_fact_that_a_run_records_about_itself_must_be_the_same(source, tmp_path):
    """Whatever facts its state holds."""
    stop_after(source, tmp_path / "out", 1, **MAGNITUDE)
    state = partial_folder(tmp_path / "out") / STATE
    whole = json.loads(state.read_text())
    assert len(whole["identity"]) > 10
    for key in whole["identity"]:
        state.write_text(json.dumps(whole | {"identity": whole["identity"] | {key: "another"}}))
        with pytest.raises(BillhookError, match=f"cannot be continued: its {key} was 'another', now it is"):
            prune(source, output=tmp_path / "out", resume=True, **MAGNITUDE)


# what does not change a result, or only through another field
SAME_RESULT = {"output", "overwrite", "resume", "pack", "spill_gib", "trust_remote_code", "device"}
SAME_RESULT |= {"bos", "skip_unreadable"}  # the samples that they give are compared


def changes(folder: Path, source: Path) -> dict[str, dict[str, Any]]:
    """For each field of a request that changes the result, the fields of another request."""
    layers = find_layers(load_model(source))
    table = Table(tuple(Row(x.name, x.block, x.kind, x.shape, {"alpha_peak": 2.0 + x.block}) for x in layers))
    plan = Plan.of_sparsities(0.5, Pattern(), {layer.name: 0.5 for layer in layers})
    save_file({"tokens": IDS}, folder / "tokens.safetensors")
    gradients = folder / "gradients.safetensors"
    done("gradients", source, "--calibration", folder / "tokens.safetensors", "--batch-size", 2, "-o", gradients)
    other = shutil.copytree(source, folder / "other")
    data = bytearray((file := sorted(other.glob("*.safetensors"))[0]).read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    return {
        "model": {"model": other},
        "sparsity": {"sparsity": 0.6},
        "recipe": {"recipe": "fast", "criterion": "", "allocator": ""},
        "criterion": {"criterion": "wanda"},
        "allocator": {"allocator": "er"},
        "pattern": {"pattern": "2:4", "sparsity": None},
        "options": {"options": {"scale": 2.0}},
        "plan": {"plan": plan, "sparsity": None, "allocator": ""},
        "table": {"table": table},
        "gradients": {"gradients": gradients},
        "calibration": {"calibration": IDS + 1},
        "samples": {"calibration": folder / "tokens.safetensors", "samples": 3},
        "length": {"calibration": folder / "tokens.safetensors", "length": 8},
        "batch_size": {"batch_size": 1},
        "seed": {"seed": 1},
        "targets": {"targets": "re:.*mlp"},
        "ignore": {"ignore": "re:.*mlp"},
        "stacks": {"stacks": "all"},
        "budget": {"budget": "joint"},
        "group": {"group": "layer"},
        "published": {"published": True},
        "refine": {"refine": "blocks"},
        "prefix": {"prefix": "dense"},
        "dtype": {"dtype": "bfloat16"},
    }


def test_every_field_of_a_request_that_changes_the_result_must_be_the_same(source, tmp_path):
    base = {"model": source, "sparsity": 0.5, "criterion": "gblm", "allocator": "uniform", "dtype": "float32"}
    base |= {"calibration": IDS, "batch_size": 2, "output": tmp_path / "out"}
    stop_after(**{"blocks": 1, "source": source, **{key: base[key] for key in base if key != "model"}})
    others = changes(tmp_path, source)
    assert others.keys() | SAME_RESULT == set(PruneRequest.__dataclass_fields__)
    for key, change in others.items():
        with pytest.raises(BillhookError, match="cannot be continued: its "):
            pytest.fail(f"{key}: {prune(resume=True, **(base | change))}")


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_whose_bytes_alone_are_damaged_is_pruned_again(source, expected, tmp_path, block):
    stop_after(source, tmp_path / "out", 2, **MAGNITUDE)
    name = f"model.layers.{block}.mlp.up_proj.weight"
    files = map(read_shard, partial_folder(tmp_path / "out").glob("*.safetensors"))
    shard = next(file for file in files if name in file.entries)
    start = shard.entries[name].start
    data = bytearray(shard.path.read_bytes())
    kept = next(at for at in range(start, len(data), 2) if data[at + 1] & 0x7F)  # so that no count of zeros can tell
    data[kept] ^= 1
    shard.path.write_bytes(data)
    continued(source, tmp_path, MAGNITUDE, expected["magnitude"])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "results": [{}], "identity": {}, "plan": {}}']
)
def test_a_damaged_state_is_refused_by_name(source, tmp_path, text):
    stop_after(source, tmp_path / "out", 1, **MAGNITUDE)
    (partial_folder(tmp_path / "out") / STATE).write_text(text)
    with pytest.raises(BillhookError, match=STATE):
        prune(source, output=tmp_path / "out", resume=True, **MAGNITUDE)
    prune(source, output=tmp_path / "out", overwrite=True, **MAGNITUDE)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "header", "stray"])
def test_damaged_blocks_of_an_unfinished_run_are_pruned_again(source, expected, tmp_path, damage):
    stop_after(source, tmp_path / "out", 2, **SPARSEGPT)
    for file in partial_folder(tmp_path / "out").glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        if damage == "flip":
            data[-50] ^= 16
        elif damage == "header":
            data[20] ^= 1
        file.write_bytes(data[:-64] if damage == "cut" else data)
        if damage == "remove":
            file.unlink()
    if damage == "stray":
        (partial_folder(tmp_path / "out") / ".billhook.unfinished.json.abc").write_text("half")
    continued(source, tmp_path, SPARSEGPT, expected["sparsegpt"])
    survived["damaged states"] = survived.get("damaged states", 0) + 1


@pytest.mark.parametrize("more", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_foreign_folder_is_left_alone(source, tmp_path, more):
    mine = partial_folder(tmp_path / "out") / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(
        BillhookError, match=r"out\.partial, where .*out would be written, holds notes\.txt, which is not from a run"
    ):
        prune(source, output=tmp_path / "out", **MAGNITUDE, **more)
    assert mine.read_text() == "mine"


def test_gradients_are_kept_until_the_directory_is_whole(source, expected, tmp_path, monkeypatch):
    """A run that fails while the last files are written goes on from its last block, and computes nothing again."""
    from billhook.steps import partial_output as unfinished

    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "complete", full)
        with pytest.raises(BillhookError, match="3 of 3 blocks are finished"):
            prune(source, output=tmp_path / "out", **GBLM)
    monkeypatch.delattr("billhook.steps.gradients.compute_gradients")
    continued(source, tmp_path, GBLM, expected["gblm"])
