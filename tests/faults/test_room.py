"""Whether a disk has room for all that a command writes is known before its work begins."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from command import TEXT, billhook, done

from billhook.architectures.layers import find_layers
from billhook.engine import loop
from billhook.export.gguf import write_gguf
from billhook.steps.gradients import gradient_bytes
from billhook.store.shards import weight_bytes

PACKED = ("prune", "model", "--sparsity", "0.75", "--criterion", "magnitude", "--allocator", "uniform", "--pack")
COMPARE = ("compare", "model", "--sparsities", "0.5", "--data", "text.txt", "--limit", "2", "-o", "table")
SMALL = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128}
GBLM = ("prune", "model", "--sparsity", "0.5", "--criterion", "gblm", "--allocator", "uniform", *TEXT)
Q8_0 = ("quantize", "model", "--type", "q8_0", "--quantizer", "round")  # .27 of float32, twice for a while
SIZE = ("compress", "model", "--bits", "8.5", *TEXT)


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
    tiny.text_file(Path("text.txt"), 40)
    return weight_bytes(tiny.save(Path("model"), tiny.llama(**SMALL)))


@pytest.mark.parametrize(
    ("command", "room"),
    [(PACKED, 1.1), (GBLM, 1.3), (("gradients", "model", *TEXT), 0.3), (Q8_0, 0.45), (SIZE, 0.45)],
    ids=["directory and packed file", "directory and gradients", "gradients", "blocks and file", "the same for a size"],
)
def test_a_disk_without_room_for_all_is_noticed_before_the_work(disk, model, monkeypatch, command, room):
    monkeypatch.setattr(loop, "walk", lambda *args, **options: pytest.fail("the work has begun"))
    monkeypatch.setattr("billhook.steps.gradients.compute_gradients", lambda *args, **options: pytest.fail("begun"))
    place = disk(room * model)
    ran = billhook(*command, "-o", place / "out")
    assert ran.code == 1, ran.err
    assert "is too full: " in ran.err
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    ("command", "files"),
    [
        (("search", "model", "--sparsity", "0.5", "--criterion", "gblm", "--allocator", "atp", "-o", "found"), 1),
        (("prune", "model", "--sparsity", "0.5", "--criterion", "gblm", "--allocator", "auto", "-o", "pruned"), 1),
        ((*COMPARE, "--criteria", "wanda,gblm", "--allocators", "uniform,owl"), 1),
        ((*COMPARE, "--criteria", "gblm", "--seeds", "2"), 2),
        ((*COMPARE, "--criteria", "gblm", "--allocators", "auto"), 2),
    ],
    ids=["search", "prune", "compare", "two seeds", "a race in compare"],
)
def test_temporary_gradients_that_do_not_fit_are_noticed_before_the_work(disk, model, monkeypatch, command, files):
    size = gradient_bytes(find_layers(tiny.llama(**SMALL)))
    place = disk((files - 0.1) * size)
    begun: list[object] = []
    for step in ("steps.search.measure", "steps.prune.measure_opened", "comparison.scored.evaluate"):
        monkeypatch.setattr(f"billhook.{step}", lambda *args, **options: begun.append(args) or pytest.fail("begun"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    ran = billhook(*command, *TEXT)
    assert (ran.code, begun) == (1, []), ran.err
    assert f"The disk of {place} is too full: {size * files / 2**20:.1f} MiB needed" in ran.err
    assert os.listdir(place) == []


def test_the_room_for_a_packed_file_is_that_of_what_is_kept(disk, model):
    """Three quarters of the prunable weights go, so both need far less than twice the model."""
    place = disk(1.75 * model)
    done(*PACKED, "-o", place / "out")
    done("verify", place / "out")
    assert os.listdir(place) == ["out"]


def test_a_disk_that_fills_up_before_the_file_is_written_leaves_the_blocks(disk, model, monkeypatch):
    place = disk(0.75 * model)
    filled = []

    def full(*args: object, **options: object) -> None:
        (place / "other").write_bytes(bytes(shutil.disk_usage(place).free - 4096))
        filled.append(True)
        monkeypatch.setattr("billhook.steps.quantize.write_gguf", write_gguf)
        write_gguf(*args, **options)

    monkeypatch.setattr("billhook.steps.quantize.write_gguf", full)
    ran = billhook(*Q8_0, "-o", place / "out")
    assert filled
    assert ran.code == 1
    assert "is too full" in ran.err
    assert "2 of 2 blocks are finished" in ran.err
    (place / "other").unlink()
    done(*Q8_0, "-o", place / "out", "--resume")
    done("verify", place / "out")
