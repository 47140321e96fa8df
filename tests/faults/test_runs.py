"""Runs that end before they are done: killed at any moment and at every operation on a file, on full, broken and read-only disks, and
beside another run. Each is continued, and the result must be the uninterrupted one, byte for byte, with nothing left beside it."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
from trial import Operations, broken, contents, full, kill, pruning, start, tear, wait

from billhook import prune
from billhook.errors import BillhookError, Interrupted
from billhook.run_state import STATE, partial_folder
from billhook.verification import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
MAGNITUDE = {"sparsity": 0.5, "criterion": "magnitude"}
SPARSEGPT = {"sparsity": 0.5, "criterion": "sparsegpt", "calibration": IDS, "dtype": "float32", "batch_size": 2}
GBLM = {"sparsity": 0.5, "criterion": "gblm", "calibration": IDS}
survived: dict[str, int] = {}


@pytest.fixture(scope="module", autouse=True)
def count():
    """Tell how many faults were tried; a fault that was not survived has failed its test."""
    yield
    print(f"\nfaults tried and survived: {sum(survived.values())} ({', '.join(f'{n} {what}' for what, n in survived.items())})")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=3, intermediate_size=48)
    return tiny.save(tmp_path_factory.mktemp("source") / "model", model, dtype=torch.bfloat16, shard="30KB", words=False)


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("expected")
    runs = {"magnitude": MAGNITUDE, "sparsegpt": SPARSEGPT, "gblm": GBLM}
    return {name: contents(prune(source, output=folder / name, **fields).output) for name, fields in runs.items()}


def continued(source: Path, folder: Path, fields: dict, expected: dict[str, bytes]) -> None:
    """Continue what is in `folder`; the output must be there then, as expected, and alone."""
    output = folder / "out"
    if output.exists() and not partial_folder(output).exists():
        assert "billhook.json" in os.listdir(output)  # it was done
        with pytest.raises(BillhookError, match="exists and is not empty"):
            prune(source, output=output, resume=True, **fields)
    else:
        prune(source, output=output, resume=True, **fields)
    assert contents(output) == expected
    assert os.listdir(folder) == ["out"]


def never_mistaken(folder: Path) -> None:
    """What a run left is complete, or is nothing that could be taken for a model."""
    for path in folder.iterdir():
        if path.is_dir() and (path / "billhook.json").exists():
            assert verify(path).ok
        elif path.is_dir() and (path / STATE).exists():
            assert "--resume" in json.loads((path / STATE).read_text())["unfinished"]
            with pytest.raises(BillhookError, match="not finished: continue it with the command that began it and --resume"):
                verify(path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "seed"), [("magnitude", MAGNITUDE, 0), ("sparsegpt", SPARSEGPT, 1), ("gblm", GBLM, 2)])
def test_killed_at_random_moments(source, expected, tmp_path, name, fields, seed):
    moments = random.Random(seed)
    begun = time.monotonic()
    assert wait(start(pruning(source, tmp_path / "whole", **fields), tmp_path / "said")) == 0
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

    assert wait(start(work, folder / "said")) == 0
    return json.loads((folder / "names").read_text())[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("happen", [kill, tear, full, broken], ids=lambda f: f.__name__)
def test_every_operation_on_a_file(source, expected, tmp_path, happen):
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
        assert code in ((-signal.SIGKILL,) if happen in (kill, tear) else (0, 1)), (at, names[at - 1], (tmp_path / "said").read_text())
        never_mistaken(folder)
        continued(source, folder, MAGNITUDE, expected["magnitude"])
        survived[f"{happen.__name__} at an operation"] = survived.get(f"{happen.__name__} at an operation", 0) + 1
        shutil.rmtree(folder)


@pytest.mark.slow
def test_killed_while_an_old_output_is_replaced(source, expected, tmp_path):
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


def stop_after(source: Path, output: Path, blocks: int, **fields) -> None:
    """Leave a run that was stopped after some blocks."""
    from billhook.job import Request, prepare, run

    done = iter(range(100))
    with pytest.raises(Interrupted, match=f"Stopped. {blocks} of 3 blocks are finished and kept in .*continue with the same command"):
        run(prepare(Request(source, output=output, **fields)), stopping=lambda: next(done) + 1 == blocks)


@pytest.mark.parametrize(("name", "fields"), [("sparsegpt", SPARSEGPT), ("gblm", GBLM)])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_run_that_is_stopped_goes_on_after_the_last_finished_block(source, expected, tmp_path, name, fields, blocks):
    stop_after(source, tmp_path / "out", blocks, **fields)
    never_mistaken(tmp_path)
    seen: list[str] = []
    prune(source, output=tmp_path / "out", resume=True, progress=seen.append, **fields)
    assert contents(tmp_path / "out") == expected[name]
    assert os.listdir(tmp_path) == ["out"]


def test_an_unfinished_run_is_neither_taken_over_nor_thrown_away_unasked(source, tmp_path):
    stop_after(source, tmp_path / "out", 1, **MAGNITUDE)
    with pytest.raises(BillhookError, match=r"out.partial holds an unfinished run \(1 of 3 blocks\). Continue it with --resume, or start"):
        prune(source, output=tmp_path / "out", **MAGNITUDE)
    changes = [
        ({"sparsity": 0.6}, "its sparsity was 0.5, now it is 0.6"),
        ({"seed": 3}, "its seed was 0, now it is 3"),
        ({"criterion": "sparsegpt", "calibration": IDS}, "its criterion was 'magnitude', now it is 'sparsegpt'"),
        ({"targets": ["re:.*mlp"]}, "its targets was"),
        ({"dtype": "float32"}, "its dtype was 'auto', now it is 'float32'"),
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


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "results": [{}], "identity": {}, "plan": {}}'])
def test_a_damaged_state_is_refused_by_name(source, tmp_path, text):
    stop_after(source, tmp_path / "out", 1, **MAGNITUDE)
    (partial_folder(tmp_path / "out") / STATE).write_text(text)
    with pytest.raises(BillhookError, match=STATE):
        prune(source, output=tmp_path / "out", resume=True, **MAGNITUDE)
    prune(source, output=tmp_path / "out", overwrite=True, **MAGNITUDE)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "header", "stray"])
def test_what_was_damaged_meanwhile_is_made_again(source, expected, tmp_path, damage):
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
def test_a_folder_of_somebody_else_is_left_alone(source, tmp_path, more):
    mine = partial_folder(tmp_path / "out") / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(BillhookError, match=r"out\.partial, where .*out would be made, holds notes\.txt, which no run put there"):
        prune(source, output=tmp_path / "out", **MAGNITUDE, **more)
    assert mine.read_text() == "mine"


def test_gradients_are_kept_until_the_directory_is_whole(source, expected, tmp_path, monkeypatch):
    """A run that fails while the last files are written goes on from its last block, and computes nothing again."""
    from billhook import job, unfinished

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "complete", full)
        with pytest.raises(BillhookError, match="3 of 3 blocks are finished"):
            prune(source, output=tmp_path / "out", **GBLM)
    monkeypatch.delattr(job, "compute_gradients")
    continued(source, tmp_path, GBLM, expected["gblm"])


def test_two_runs_into_one_directory(source, expected, tmp_path):
    ready, go = tmp_path / "ready", tmp_path / "go"

    def slow() -> None:
        def stopping() -> bool:
            ready.touch()
            while not go.exists():
                time.sleep(0.01)
            return False

        from billhook.job import Request, prepare, run

        run(prepare(Request(source, output=tmp_path / "out", **MAGNITUDE)), stopping=stopping)

    first = start(slow, tmp_path / "said")
    while not ready.exists():
        time.sleep(0.01)
    for more in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(BillhookError, match=r"Another run is writing .*out\.partial at this moment: wait for it"):
            prune(source, output=tmp_path / "out", **MAGNITUDE, **more)
    go.touch()
    assert wait(first) == 0
    assert contents(tmp_path / "out") == expected["magnitude"]
    survived["second runs"] = 2


def test_the_lock_of_a_dead_process_does_not_hold(source, expected, tmp_path):
    ready = tmp_path / "ready"

    def hang() -> None:
        from billhook.job import Request, prepare, run

        def stopping() -> bool:
            ready.touch()
            time.sleep(60)
            return False

        run(prepare(Request(source, output=tmp_path / "here/out", **MAGNITUDE)), stopping=stopping)

    (tmp_path / "here").mkdir()
    child = start(hang, tmp_path / "said")
    while not ready.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    wait(child)
    continued(source, tmp_path / "here", MAGNITUDE, expected["magnitude"])


def test_a_disk_that_fills_and_is_given_room(source, expected, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        stop_after(source, disk / "out", 2, **MAGNITUDE)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(Interrupted, match=r"The disk is full: .* Make room. 2 of 3 blocks are finished and kept in"):
            prune(source, output=disk / "out", resume=True, **MAGNITUDE)
        (disk / "filler").unlink()
        continued(source, disk, MAGNITUDE, expected["magnitude"])
        survived["full disks"] = 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_limit_on_the_size_of_files(source, tmp_path):
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


def test_an_output_that_is_read_only(source, tmp_path):
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
