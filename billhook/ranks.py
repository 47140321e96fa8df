"""One run in several processes, as torchrun starts them; everything here does nothing in a run of one process.

The calibration windows are shared out among the processes (`mine`), each statistic is summed over them (`sum_`), so that all of them know
what one process would know, up to the order of floating-point sums; the layers of a block are then shared out, and what each made is
given to all (`share_`). A process that is lost ends the others with an error that says so.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from billhook.errors import BillhookError, Interrupted
from billhook.torchrun import started

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # a process may wait for the others as long as the largest layer takes


def world() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Take part in the run that torchrun started, if it did."""
    if not started():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # numbers and records are exchanged from the CPU on a GPU too
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be lost


def mine(items: Sequence[T]) -> list[T]:
    """The items that this process takes."""
    return list(items[dist.get_rank() :: world()]) if world() > 1 else list(items)


def check_share(windows: int) -> None:
    """Raise BillhookError unless every process gets a calibration window."""
    if windows < world():
        raise BillhookError(f"{world()} processes cannot share {windows} calibration windows: give more --samples, or start fewer.")


def sum_(value: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if world() > 1:
        _together(lambda: dist.all_reduce(value))
    return value


def anywhere(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return bool(sum_(torch.tensor(int(flag))).item())


def gather(value: T) -> list[T]:
    """What each process has, in the order of the processes."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    _together(lambda: dist.all_gather_object(found, value))
    return found


def share_(value: Tensor, owner: int) -> None:
    """Give every process what process `owner` has in a tensor, which may be a view, in place."""
    if world() > 1:
        copy = value.contiguous()
        _together(lambda: dist.broadcast(copy, owner))
        value.copy_(copy)


def wait() -> None:
    """Wait for all processes."""
    if world() > 1:
        _together(dist.barrier)


def _together(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise Interrupted(f"Process {dist.get_rank()} of {world()} lost another one, whose own message says why ({reason}).") from None
