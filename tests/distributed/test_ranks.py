"""One run in several processes: the result of one process, and what happens when a process is lost.

The processes are copies of this one, which has loaded torch already, with the variables that torchrun sets; the store
is here, as it is in torchrun. One test runs torchrun itself.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from paths import TESTS
from safetensors.torch import load_file

from billhook.cli import main
from billhook.distributed import heartbeat
from billhook.engine import streaming
from billhook.steps import partial_output as unfinished
from billhook.steps.verify import verify

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]
TEXT = ("--calibration", "text.txt", "--samples", "8", "--length", "32", "--batch-size", "2")
PRUNE = ("prune", "model", "--sparsity", "0.5", *TEXT)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.save(folder / "model", tiny.mixtral(), shard="60KB")
    tiny.text_file(folder / "text.txt", 200)
    return folder


@dataclass
class Ran:
    """Exit codes and what was said on stderr, by process; seconds since a process ended first."""

    codes: list[int]
    said: list[str]
    seconds: float


def together(
    place: Path,
    processes: int,
    *arguments: str,
    before: Callable[[], None] = lambda: None,
    ending: bool = False,
    others: float = 60,
) -> Ran:
    """Run `billhook ARGUMENTS` in several processes, `before` in each of them first. When one ends, the others get
    `others` seconds, and where `ending`, SIGTERM, as from torchrun."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    files = [place / f"said.{rank}" for rank in range(processes)]

    def work(rank: int) -> None:
        try:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
            }
            os.environ |= {
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            os.chdir(place)
            sys.argv, sys.stderr = ["billhook", *arguments], open(files[rank], "w", buffering=1)  # noqa: SIM115
            before()
            main()
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(3)

    children: list[int] = []
    for rank in range(processes):
        children.append(os.fork())
        if not children[-1]:
            work(rank)
    codes, first = dict[int, int](), None
    until = time.monotonic() + 120
    while len(codes) < processes and time.monotonic() < until:
        for rank, child in enumerate(children):
            if rank not in codes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if first is None:
                    first = time.monotonic()
                    until = first + others
                    for number, other in enumerate(children) if ending else ():
                        if number not in codes:
                            os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    for rank, child in enumerate(children):
        if rank not in codes:
            os.kill(child, signal.SIGKILL)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert first is not None, "no process ended"
    return Ran(
        [codes[rank] for rank in range(processes)], [file.read_text() for file in files], time.monotonic() - first
    )


def done(place: Path, processes: int, *arguments: str) -> Ran:
    ran = together(place, processes, *arguments)
    assert ran.codes == [0] * processes, ran.said
    return ran


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("criterion", ["sparsegpt", "admm", "gblm"])
def test_the_result_is_that_of_one_process(place, processes, criterion):
    """Sums over processes differ in the last bits, so weights may differ by 1e-4 of their size, and near ties may fall
    the other way."""
    fields = (*PRUNE, "--criterion", criterion)
    if not (place / f"{criterion}1").exists():
        done(place, 1, *fields, "-o", f"{criterion}1")
    log = f"{criterion}{processes}.jsonl"
    ran = done(place, processes, *fields, "-o", f"{criterion}{processes}", "--log-file", log)
    assert "weights removed" in ran.said[0]
    assert not any(ran.said[1:])
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


def test_processes_that_meet_other_experts_first(place):
    fields = (*PRUNE[:6], "--samples", "16", "--length", "4", "--batch-size", "1", "--criterion", "admm")
    for processes in (1, 2):
        done(place, processes, *fields, "-o", f"short{processes}")
    one, two = weights(place / "short1"), weights(place / "short2")
    for name, value in one.items():
        likeness = torch.nn.functional.cosine_similarity(value.flatten(), two[name].flatten(), dim=0)
        assert likeness > 0.99, (name, likeness)


def test_auto_shares_what_is_left_of_a_batch(place):
    fields = (*PRUNE[:4], "--calibration", "text.txt", "--samples", "8", "--length", "32", "--batch-size", "4")
    done(place, 2, *fields, "--allocator", "auto", "--criterion", "wanda", "-o", "auto2")
    assert verify(place / "auto2").ok


def test_tables_are_those_of_one_process(place):
    fields = ("measure", "model", "--metrics", "alpha_peak,outlier_ratio:5", *TEXT)
    for processes in (1, 2):
        done(place, processes, *fields, "-o", f"table{processes}.json")
    one, two = (json.loads((place / f"table{n}.json").read_text())["rows"] for n in (1, 2))
    for row, other in zip(one, two, strict=True):
        assert row["layer"] == other["layer"]
        assert row["metrics"] == pytest.approx(other["metrics"], rel=1e-3)


def test_too_few_windows_to_share(place):
    ran = together(place, 2, *PRUNE[:6], "--samples", "1", "--length", "32", "-o", "few")
    assert ran.codes == [2, 2]
    assert "2 processes cannot share 1 calibration windows: give more --samples, or start fewer" in ran.said[0]
    assert not (place / "few").exists()


def in_block_one(rank: int, happen: Callable[[], None]) -> Callable[[], None]:
    """Let something happen to a process when it has pruned its second block."""

    def install() -> None:
        real = unfinished.PartialOutput.finished

        def finished(self, block, results):
            if block.index == 1 and os.environ["RANK"] == str(rank):
                happen()
            real(self, block, results)

        unfinished.PartialOutput.finished = finished

    return install


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def whole(place: Path) -> Path:
    """What two processes make of the model by Wanda."""
    if not (place / "whole").exists():
        done(place, 2, *PRUNE, "-o", "whole")
    return place / "whole"


def continued(place: Path, output: str, processes: int = 2) -> None:
    assert (place / f"{output}.partial").exists()
    assert not (place / output).exists()
    done(place, processes, *PRUNE, "-o", output, "--resume")
    for name, value in weights(whole(place)).items():
        assert torch.equal(value, weights(place / output)[name])


@pytest.mark.parametrize("ending", [False, True], ids=["alone", "and torchrun ends the others"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_named_within_seconds(place, lost, ending):
    output = f"lost{lost}{ending}"
    ran = together(place, 2, *PRUNE, "-o", output, before=in_block_one(lost, die), ending=ending)
    other = 1 - lost
    assert ran.codes[lost] == -signal.SIGKILL
    assert ran.codes[other] == 1
    assert ran.seconds < 15, ran.said
    last = ran.said[other].splitlines()[-1]
    assert last.startswith(f"billhook, process {other} of 2: Process {lost} of 2 was lost: it ended without a word.")
    assert "--resume" in last
    if lost:
        assert re.search(r"[12] of 2 blocks are finished and kept in", last)
    continued(place, output)


def test_only_the_lost_one_of_four_is_named(place):
    ran = together(place, 4, *PRUNE, "-o", "four", before=in_block_one(2, die))
    assert [code for rank, code in enumerate(ran.codes) if rank != 2] == [1, 1, 1]
    for rank in (0, 1, 3):
        assert re.findall(r"Process (\d) of 4", ran.said[rank]) == ["2"], ran.said


def test_a_process_that_fails_tells_the_others_why(place):
    def fail() -> None:
        raise OSError(5, "Input/output error")

    ran = together(place, 2, *PRUNE, "-o", "failed", before=in_block_one(1, fail))
    assert ran.codes == [1, 1]
    assert ran.seconds < 15
    assert "Process 1 of 2 failed: [Errno 5] Input/output error" in ran.said[0].splitlines()[-1]
    assert re.search(r"[12] of 2 blocks are finished and kept in", ran.said[0].splitlines()[-1])
    continued(place, "failed")


def test_the_directory_keeps_its_name_while_a_slower_process_reads_it(place):
    """A run whose blocks are all finished is continued; process 1 takes its time to pass through them."""

    def fail(self, record):
        raise OSError(5, "Input/output error")

    def failing() -> None:
        unfinished.PartialOutput.complete = fail

    def slow() -> None:
        real = streaming.Stream.load

        def load(self, index, stored):
            time.sleep(os.environ["RANK"] == "1")
            real(self, index, stored)

        streaming.Stream.load = load

    ran = together(place, 2, *PRUNE, "-o", "slow", before=failing)
    assert ran.codes == [1, 1]
    assert "2 of 2 blocks are finished and kept in" in ran.said[0]
    assert together(place, 2, *PRUNE, "-o", "slow", "--resume", before=slow).codes == [0, 0]
    assert weights(place / "slow").keys() == weights(whole(place)).keys()


def test_a_process_that_falls_silent_ends_the_others(place):
    """As when a machine vanishes: no connection breaks. The patience is a minute, here two seconds."""

    def before() -> None:
        heartbeat.Heartbeat.__init__.__defaults__ = ("", 2.0)
        in_block_one(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))()

    ran = together(place, 2, *PRUNE, "-o", "silent", before=before, others=1)
    assert ran.codes[0] == 1, ran.said
    assert "process 1 of 2 was lost (nothing heard for 2 s). Start the same command again" in ran.said[0]
    continued(place, "silent")


def test_a_process_that_fails_ends_those_that_wait_for_something_else_with_its_reason(place):
    def fail() -> None:
        raise OSError(5, "Input/output error")

    def before() -> None:
        heartbeat.Heartbeat.__init__.__defaults__ = ("", 2.0)
        in_block_one(0, lambda: time.sleep(60))()
        in_block_one(1, fail)()

    ran = together(place, 2, *PRUNE, "-o", "waits", before=before)
    assert ran.codes == [1, 1], ran.said
    assert "process 1 of 2 failed: [Errno 5] Input/output error. Start the same command again" in ran.said[0]
    assert "lost" not in ran.said[0]
    continued(place, "waits")


def test_torchrun_names_the_lost_process(place):
    paths = [str(TESTS), str(TESTS / "distributed")]
    code = f"import sys; sys.path[:0] = {paths}; import test_ranks as t; t.in_block_one(1, t.die)(); t.main()"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    ran = subprocess.run(
        [*start, sys.executable, "-c", code, *PRUNE, "-o", "lost"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ran.returncode != 0
    assert re.search(r"rank\s*:\s*1 .*\n.*exitcode\s*:\s*-9", ran.stderr)  # torchrun's own summary
    assert "billhook, process 0 of 2: Process 1 of 2 was lost: it ended without a word." in ran.stderr
    assert 'billhook/parallel/ranks.py", line' not in ran.stderr  # no traceback of ours
    continued(place, "lost")
