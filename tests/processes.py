"""A run in several processes: copies of this one, where torch is loaded, with the variables that torchrun sets.

The store is here, as it is in torchrun.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from billhook.cli import main

TEXT = ("--calibration", "text.txt", "--samples", "8", "--length", "32", "--batch-size", "2")


PRUNE = ("prune", "model", "--sparsity", "0.5", *TEXT, "--criterion", "wanda")


@dataclass
class Ran:
    """Exit codes and what was said on stderr, by process."""

    codes: list[int]
    said: list[str]


def together(
    place: Path,
    processes: int,
    *arguments: str,
    before: Callable[[], None] = lambda: None,
    ending: bool = False,
    others: float = 240,
) -> Ran:
    """Run `billhook ARGUMENTS` in several processes, `before` in each of them first. When one ends, the others get
    `others` seconds, and where `ending`, SIGTERM, as from torchrun."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=240))
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
    codes = dict[int, int]()
    until = time.monotonic() + 240
    while len(codes) < processes and time.monotonic() < until:
        for rank, child in enumerate(children):
            if rank not in codes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if len(codes) == 1:
                    until = time.monotonic() + others
                    for number, other in enumerate(children) if ending else ():
                        if number not in codes:
                            os.kill(other, signal.SIGTERM)
        time.sleep(0.01)
    ended = bool(codes)
    for rank, child in enumerate(children):
        if rank not in codes:
            os.kill(child, signal.SIGKILL)
            codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended, "no process ended"
    return Ran([codes[rank] for rank in range(processes)], [file.read_text() for file in files])


def done(place: Path, processes: int, *arguments: str) -> Ran:
    ran = together(place, processes, *arguments)
    assert ran.codes == [0] * processes, ran.said
    return ran


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}
