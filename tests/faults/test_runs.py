"""Runs that end before they are done: killed at any moment and at every operation on a file, on full, broken and
read-only disks, and beside another run. Each is continued, and the result must be the uninterrupted one, byte for byte,
with nothing left beside it."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command import contents
from trial import (
    GBLM,
    MAGNITUDE,
    SPARSEGPT,
    Operations,
    broken,
    continued,
    full,
    kill,
    never_mistaken,
    pruning,
    start,
    stop_after,
    survived,
    tear,
    wait,
)

from billhook import prune
from billhook.errors import BillhookError, Interrupted
from billhook.steps.state import STATE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "fields", "seed"), [("magnitude", MAGNITUDE, 0), ("sparsegpt", SPARSEGPT, 1), ("gblm", GBLM, 2)]
)
def test_a_run_killed_at_any_moment_is_resumed(source, expected, tmp_path, name, fields, seed):
    moments = random.Random(seed)
    begun = time.monotonic()
    assert wait(start(pruning(source, tmp_path / "whole", **fields), tmp_path / "said")) == 0, (
        tmp_path / "said"
    ).read_text()
    length = time.monotonic() - begun
    for trial in range(20):
        folder = tmp_path / str(trial)
        folder.mkdir()
        for _ in range(2):  # killed, continued and killed, continued
            child = start(pruning(source, folder / "out", resume=True, **fields), tmp_path / "said")
            time.sleep(moments.random() * length)
            os.kill(child, signal.SIGKILL)
            wait(child)
            never_mistaken(folder)
            survived["kills at random moments"] = survived.get("kills at random moments", 0) + 1
        continued(source, folder, fields, expected[name])


def operations(source: Path, folder: Path, **fields) -> list[str]:
    """The operations on files of one run."""

    def work() -> None:
        seen = Operations().install()
        pruning(source, folder / "counted", **fields)()
        (folder / "names").write_text(json.dumps(seen.names))

    assert wait(start(work, folder / "said")) == 0, (folder / "said").read_text()
    return json.loads((folder / "names").read_text())[:-1]


@pytest.mark.nightly
@pytest.mark.parametrize("happen", [kill, tear, full, broken], ids=lambda f: f.__name__)
def test_a_run_survives_a_failure_of_every_file_operation(source, expected, tmp_path, happen):
    names = operations(source, tmp_path, **MAGNITUDE)
    assert {"open", "pwrite", "fsync", "os.rename", "os.remove"} <= set(names)
    points = range(1, len(names) + 1)
    if happen is not kill:
        points = [n for n in points if (names[n - 1] == "pwrite" if happen is tear else True)]
    for at in points:
        folder = tmp_path / f"{at}"
        folder.mkdir()

        def work(at: int = at, folder: Path = folder) -> None:
            Operations(at, happen).install()
            pruning(source, folder / "out", **MAGNITUDE)()

        code = wait(start(work, tmp_path / "said"))
        assert code in ((-signal.SIGKILL,) if happen in (kill, tear) else (0, 1)), (
            at,
            names[at - 1],
            (tmp_path / "said").read_text(),
        )
        never_mistaken(folder)
        continued(source, folder, MAGNITUDE, expected["magnitude"])
        survived[f"{happen.__name__} at an operation"] = survived.get(f"{happen.__name__} at an operation", 0) + 1
        shutil.rmtree(folder)


@pytest.mark.nightly
def test_a_run_killed_while_it_deletes_gradients_is_resumed(source, expected, tmp_path):
    """From when the record is written on, until the gradients beside it are gone and the directory has its name."""
    names = operations(source, tmp_path, **GBLM)
    for at in range(len(names) - 19, len(names) + 1):
        folder = tmp_path / f"{at}"
        folder.mkdir()

        def work(at: int = at, folder: Path = folder) -> None:
            Operations(at, kill).install()
            pruning(source, folder / "out", **GBLM)()

        assert wait(start(work, tmp_path / "said")) == -signal.SIGKILL
        never_mistaken(folder)
        continued(source, folder, GBLM, expected["gblm"])
        survived["kills beside gradients"] = survived.get("kills beside gradients", 0) + 1


@pytest.mark.nightly
def test_an_output_is_old_or_new_when_the_run_is_killed(source, expected, tmp_path):
    fields = MAGNITUDE | {"overwrite": True}
    old = contents(prune(source, output=tmp_path / "old", sparsity=0.3, criterion="magnitude").output)
    shutil.copytree(tmp_path / "old", tmp_path / "counted")
    names = operations(source, tmp_path, **fields)
    for at in range(len(names) - 24, len(names) + 1):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        shutil.copytree(tmp_path / "old", folder / "out")

        def work(at: int = at, folder: Path = folder) -> None:
            Operations(at, kill).install()
            pruning(source, folder / "out", **fields)()

        assert wait(start(work, tmp_path / "said")) == -signal.SIGKILL
        found = [contents(path) for path in folder.iterdir() if (path / "billhook.json").exists()]
        whole = [{k: v for k, v in files.items() if k != STATE} for files in found]
        assert old in whole or expected["magnitude"] in whole
        prune(source, output=folder / "out", resume=True, **fields)
        assert contents(folder / "out") == expected["magnitude"]
        assert os.listdir(folder) == ["out"]
        survived["kills while replacing"] = survived.get("kills while replacing", 0) + 1


def test_two_runs_into_one_directory_do_not_mix(source, expected, tmp_path):
    ready, go = tmp_path / "ready", tmp_path / "go"

    def slow() -> None:
        def stopping() -> bool:
            ready.touch()
            while not go.exists():
                time.sleep(0.01)
            return False

        from billhook.steps.prune import PruneRequest, prepare, run

        run(prepare(PruneRequest(source, output=tmp_path / "out", **MAGNITUDE)), stopping=stopping)

    first = start(slow, tmp_path / "said")
    while not ready.exists():
        time.sleep(0.01)
    for more in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BillhookError, match=r"Another run is writing .*out\.partial: wait for it"):
            prune(source, output=tmp_path / "out", **MAGNITUDE, **more)
    go.touch()
    assert wait(first) == 0
    assert contents(tmp_path / "out") == expected["magnitude"]
    survived["second runs"] = 2


def test_the_lock_of_a_dead_process_does_not_hold(source, expected, tmp_path):
    ready = tmp_path / "ready"

    def hang() -> None:
        from billhook.steps.prune import PruneRequest, prepare, run

        def stopping() -> bool:
            ready.touch()
            time.sleep(60)
            return False

        run(prepare(PruneRequest(source, output=tmp_path / "here/out", **MAGNITUDE)), stopping=stopping)

    (tmp_path / "here").mkdir()
    child = start(hang, tmp_path / "said")
    while not ready.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    wait(child)
    continued(source, tmp_path / "here", MAGNITUDE, expected["magnitude"])


def test_a_run_on_a_full_disk_continues_once_there_is_room(source, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        stop_after(source, disk / "out", 2, **MAGNITUDE)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(
            Interrupted, match=r"The disk is full: .* Make room. 2 of 3 blocks are finished and kept in"
        ):
            prune(source, output=disk / "out", resume=True, **MAGNITUDE)
        (disk / "filler").unlink()
        continued(source, disk, MAGNITUDE, expected["magnitude"])
        survived["full disks"] = 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_on_the_size_of_files_is_one_message(source, tmp_path):
    import resource

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        pruning(source, tmp_path / "place/out", **MAGNITUDE)()

    (tmp_path / "place").mkdir()
    assert wait(start(work, tmp_path / "said")) == 1
    assert "Cannot write" in (tmp_path / "said").read_text()
    assert "File too large" in (tmp_path / "said").read_text()
    assert os.listdir(tmp_path / "place") == []


def test_a_read_only_output_is_one_message(source, tmp_path):
    place = tmp_path / "place"
    place.mkdir()

    def work() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        pruning(source, place / "out", **MAGNITUDE)()

    place.chmod(0o555)
    tmp_path.chmod(0o755)
    if os.geteuid() == 0 and any(not os.stat(folder).st_mode & 0o005 for folder in (source, *source.parents)):
        for folder in [source, *list(source.parents)[:4]]:
            folder.chmod(0o755)
        for file in source.iterdir():
            file.chmod(0o644)
    said = tmp_path / "said"
    said.touch()
    said.chmod(0o666)
    assert wait(start(work, said)) == 2, said.read_text()
    assert "place is not writable" in said.read_text()
