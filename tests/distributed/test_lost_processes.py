"""A process that fails or is lost ends the others with its reason, not by silence; the run can be resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paths import TESTS
from processes import PRUNE, done, together, weights

from billhook.distributed import heartbeat
from billhook.engine import streaming
from billhook.steps import partial_output as unfinished

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


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


def never_silent(before: Callable[[], None]) -> Callable[[], None]:
    """Without an end by silence: a process that ends has noticed something else."""

    def install() -> None:
        heartbeat.Heartbeat.__init__.__defaults__ = ("", float("inf"))
        before()

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
def test_a_lost_process_is_named_before_its_silence_is(place, lost, ending):
    output = f"lost{lost}{ending}"
    ran = together(place, 2, *PRUNE, "-o", output, before=never_silent(in_block_one(lost, die)), ending=ending)
    other = 1 - lost
    assert ran.codes[lost] == -signal.SIGKILL
    assert ran.codes[other] == 1
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

    ran = together(place, 2, *PRUNE, "-o", "failed", before=never_silent(in_block_one(1, fail)))
    assert ran.codes == [1, 1]
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


def test_a_process_without_heartbeat_ends_the_others(place):
    """As when a machine vanishes: no connection breaks. The patience is a minute, here two seconds."""

    def before() -> None:
        heartbeat.Heartbeat.__init__.__defaults__ = ("", 2.0)
        in_block_one(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))()

    ran = together(place, 2, *PRUNE, "-o", "silent", before=before, others=1)
    assert ran.codes[0] == 1, ran.said
    assert "process 1 of 2 was lost (nothing heard for 2 s). Start the same command again" in ran.said[0]
    continued(place, "silent")


def test_a_process_that_fails_ends_processes_that_wait_elsewhere_with_its_reason(place):
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
    code = f"import sys; sys.path[:0] = {paths}; import test_lost_processes as t; "
    code += "t.in_block_one(1, t.die)(); from billhook.cli import main; main()"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    ran = subprocess.run(
        [*start, sys.executable, "-c", code, *PRUNE, "-o", "lost"],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode != 0
    assert re.search(r"rank\s*:\s*1 .*\n.*exitcode\s*:\s*-9", ran.stderr)  # torchrun's own summary
    assert "billhook, process 0 of 2: Process 1 of 2 was lost: it ended without a word." in ran.stderr
    assert "billhook/distributed/" not in ran.stderr  # no traceback of ours
    continued(place, "lost")
