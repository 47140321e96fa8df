"""Whether a disk has room for all that a command writes is known before its work begins."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from command import TEXT, billhook, done

from billhook.engine import loop
from billhook.store.shards import weight_bytes

PACKED = ("prune", "model", "--sparsity", "0.75", "--criterion", "magnitude", "--allocator", "uniform", "--pack")
GBLM = ("prune", "model", "--sparsity", "0.5", "--criterion", "gblm", "--allocator", "uniform", *TEXT)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[float], Path]]:
    """A function that mounts a disk of so many bytes at `disk`."""
    place = tmp_path / "disk"
    place.mkdir()

    def mounted(size: float) -> Path:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size) // 4096 * 4096}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small disk")
        return place

    yield mounted
    subprocess.run(["umount", "-q", str(place)], check=False)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A directory `model` beside a text, in which the test runs; the bytes of its weights."""
    monkeypatch.chdir(tmp_path)
    small = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128}
    tiny.text_file(Path("text.txt"), 40)
    return weight_bytes(tiny.save(Path("model"), tiny.llama(**small)))


@pytest.mark.parametrize(
    ("command", "room"),
    [(PACKED, 1.1), (GBLM, 1.3), (("gradients", "model", *TEXT), 0.3)],
    ids=["directory and packed file", "directory and gradients", "gradients"],
)
def test_a_disk_without_room_for_all_is_noticed_before_the_work(disk, model, monkeypatch, command, room):
    monkeypatch.setattr(loop, "walk", lambda *args, **options: pytest.fail("the work has begun"))
    monkeypatch.setattr("billhook.steps.gradients.compute_gradients", lambda *args, **options: pytest.fail("begun"))
    place = disk(room * model)
    ran = billhook(*command, "-o", place / "out")
    assert ran.code == 1, ran.err
    assert "is too full: " in ran.err
    assert os.listdir(place) == []


def test_the_room_for_a_packed_file_is_that_of_what_is_kept(disk, model):
    """Three quarters of the prunable weights go, so both need far less than twice the model."""
    place = disk(1.75 * model)
    done(*PACKED, "-o", place / "out")
    done("verify", place / "out")
    assert os.listdir(place) == ["out"]
