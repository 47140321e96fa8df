"""An output directory appears whole or not at all, and replaces only what it may."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from command import contents
from sparse_models import prune_with_record

import billhook.store.directory as save
import billhook.store.sinks as sinks
from billhook.errors import BillhookError, JobError
from billhook.store.directory import save_pruned
from billhook.store.output import check_output
from billhook.tasks.opening import load_model


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source") / "model", dtype=torch.bfloat16, shard="60KB")


def test_the_output_has_ordinary_permissions(source, tmp_path):
    out = save_pruned(load_model(source), source, tmp_path / "out").path
    (tmp_path / "plain").mkdir()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_an_empty_directory_is_used_as_output(source, tmp_path):
    (tmp_path / "out").mkdir()
    save_pruned(load_model(source), source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_a_directory_that_is_not_empty_is_replaced_only_with_overwrite(source, tmp_path):
    model = load_model(source)
    out = save_pruned(model, source, tmp_path / "out").path
    (out / "old").write_text("x")
    with pytest.raises(BillhookError, match=r"exists and is not empty.*overwrite=True"):
        save_pruned(model, source, out)
    assert (out / "old").exists()
    save_pruned(model, source, out, overwrite=True)
    assert contents(out) == contents(source)
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_that_is_no_model_is_never_replaced(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BillhookError, match="not a model directory"):
        check_output(tmp_path, source, overwrite=True)


def test_impossible_outputs_are_refused(source, tmp_path):
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


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "inside")
    for output in (".", ".."):
        with pytest.raises(BillhookError, match="while it is the current folder"):
            check_output(Path(output), overwrite=True)
    assert check_output(Path("new")) == tmp_path / "out" / "inside" / "new"


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
def test_a_full_disk_leaves_nothing_behind(source, tmp_path, room, message, kept):
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
            save_pruned(load_model(source, dtype="bfloat16"), source if kept else None, disk / "out")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
