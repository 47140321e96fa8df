"""Runs that were stopped after a block: they go on from there with the same result, and only where nothing has changed
meanwhile."""

import json
import os
import shutil

import pytest
from command import contents
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

from billhook import prune
from billhook.errors import BillhookError
from billhook.steps.state import STATE, partial_folder

pytestmark = [pytest.mark.gate, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.mark.parametrize(("name", "fields"), [("sparsegpt", SPARSEGPT), ("gblm", GBLM)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_stopped_run_is_resumed_after_the_last_finished_block(source, expected, tmp_path, name, fields, blocks):
    stop_after(source, tmp_path / "out", blocks, **fields)
    never_mistaken(tmp_path)
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


def test_other_data_is_another_run(source, tmp_path):
    stop_after(source, tmp_path / "out", 1, **SPARSEGPT)
    with pytest.raises(BillhookError, match="cannot be continued: its calibration was"):
        prune(source, output=tmp_path / "out", resume=True, **(SPARSEGPT | {"calibration": IDS + 1}))


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
