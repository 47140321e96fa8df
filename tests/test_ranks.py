"""One run in several processes started by torchrun: the result of one process, and what happens when a process is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from billhook.verification import verify

pytestmark = pytest.mark.slow
TEXT = ("--calibration", "text.txt", "--samples", "8", "--length", "32", "--batch-size", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save(folder / "model", tiny.mixtral(), shard="60KB")
    tiny.text_file(folder / "text.txt", 200)
    return folder


def command(processes: int, *arguments: str) -> list[str]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *run, "-m", "billhook", *arguments]


def done(place: Path, processes: int, *arguments: str) -> subprocess.CompletedProcess:
    ran = subprocess.run(
        command(processes, *arguments), cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("criterion", ["sparsegpt", "gblm"])
def test_the_result_is_that_of_one_process(place, processes, criterion):
    """Sums over processes differ in the last bits, so weights may differ by 1e-4 of their size, and near ties may fall the other way."""
    fields = ("prune", "model", "--sparsity", "0.5", "--criterion", criterion, *TEXT)
    if not (place / f"{criterion}1").exists():
        done(place, 1, *fields, "-o", f"{criterion}1")
    log = f"{criterion}{processes}.jsonl"
    ran = done(place, processes, *fields, "-o", f"{criterion}{processes}", "--log-file", log)
    assert len(re.findall("weights removed", ran.stderr)) == 1
    assert verify(place / f"{criterion}{processes}").ok
    one, many = weights(place / f"{criterion}1"), weights(place / f"{criterion}{processes}")
    for name, value in one.items():
        moved = (value == 0) != (many[name] == 0)
        assert moved.float().mean() < 2e-3, name
        assert torch.allclose(value[~moved], many[name][~moved], rtol=1e-3, atol=1e-4), name
    for rank in range(processes):
        file = place / (log if rank == 0 else log.replace(".jsonl", f".rank{rank}.jsonl"))
        events = [json.loads(line) for line in file.read_text().splitlines()]
        assert events[0]["event"] == "start"
        assert events[-1]["event"] == "end"
        assert sum(event["event"] == "layer" for event in events) == events[0]["layers"]


def test_tables_are_those_of_one_process(place):
    fields = ("measure", "model", "--metrics", "alpha_peak,outlier_ratio:5", *TEXT)
    for processes in (1, 2):
        done(place, processes, *fields, "-o", f"table{processes}.json")
    one, two = (json.loads((place / f"table{n}.json").read_text())["rows"] for n in (1, 2))
    for row, other in zip(one, two, strict=True):
        assert row["layer"] == other["layer"]
        assert row["metrics"] == pytest.approx(other["metrics"], rel=1e-3)


def test_too_few_windows_to_share(place):
    ran = subprocess.run(
        command(2, "prune", "model", "-o", "few", "--sparsity", "0.5", *TEXT[:2], "--samples", "1", "--length", "32"),
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "2 processes cannot share 1 calibration windows: give more --samples, or start fewer" in ran.stderr
    assert not (place / "few").exists()


def test_a_lost_process_is_named_and_the_run_goes_on_afterwards(place):
    fields = ("prune", "model", "--sparsity", "0.5", "--criterion", "wanda", *TEXT)
    done(place, 2, *fields, "-o", "whole")
    code = f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_ranks; test_ranks.die_in_block_one()"
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        sys.executable,
        "-c",
        code,
    ]
    ran = subprocess.run([*run, *fields, "-o", "lost"], cwd=place, capture_output=True, text=True, timeout=280)
    assert ran.returncode != 0
    assert re.search(r"rank\s*:\s*1 ", ran.stderr)  # torchrun's own summary names it
    assert "SIGKILL" in ran.stderr
    assert "in _together" not in ran.stderr  # no traceback of ours
    assert (place / "lost.partial").exists()
    assert not (place / "lost").exists()
    done(place, 2, *fields, "-o", "lost", "--resume")
    for name, value in weights(place / "whole").items():
        assert torch.equal(value, weights(place / "lost")[name])


def die_in_block_one() -> None:
    """Run the command line in a process of which the second dies after its first block."""
    from billhook import unfinished
    from billhook.cli import main

    real = unfinished.Unfinished.finished

    def finished(self, block, results):
        if block.index == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, block, results)

    unfinished.Unfinished.finished = finished
    main()
