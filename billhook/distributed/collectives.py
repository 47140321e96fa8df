"""Collectives for one run in several processes, started by torchrun; they do nothing in a single process.

Each process reads a shard of the calibration windows (`shard`), and each statistic is summed over all processes
(`all_reduce_`), so that all of them have the statistics of a single process up to the order of floating-point sums.
The layers of a block are then sharded, and the results broadcast (`broadcast_`). When a process is lost, the others end
within seconds with an error that names it (`billhook.distributed.heartbeat`).
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from traceback import walk_tb
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from billhook.distributed.heartbeat import AGAIN, Heartbeat
from billhook.distributed.torchrun import started
from billhook.errors import BillhookError, Interrupted, first_line

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # for the others to prune the largest layer
STORE_TIMEOUT = timedelta(seconds=30)


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def distributed(device: str) -> Iterator[None]:
    """Join the process group of torchrun, if it started this process."""
    if not started():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # counters and records are on the CPU on a GPU too
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    heart = _heartbeat()
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        _end(heart, error)
    except BaseException as error:
        heart.leave(_first_line(error))
        raise
    heart.leave()
    dist.destroy_process_group()  # not after an error: it would wait for lost processes


def _heartbeat() -> Heartbeat:
    """Start the heartbeat of this process, with its own connection to the store."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=STORE_TIMEOUT)
    heart = Heartbeat(store, dist.get_rank(), world(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    dist.barrier()
    heart.start()
    return heart


def _end(heart: Heartbeat, error: BaseException) -> NoReturn:
    """End an interrupted run: raise the error, with the name of the lost process if there is one."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from torchrun when a process is lost; this one ends already
    lost, message = heart.lost(), str(error)
    heart.leave("" if lost else _first_line(error))
    if lost:
        parts = [lost, message, "" if isinstance(error, Interrupted) and error.advised else AGAIN]
        raise Interrupted(" ".join(part for part in parts if part)) from None
    if isinstance(error, KeyboardInterrupt) and dist.get_rank():
        raise Interrupted("Stopped; process 0 says what is kept.", stopped=True) from None
    raise error


def _first_line(error: BaseException) -> str:
    """The first line of an error's message, without the source position with which some begin."""
    return re.sub(r"^\[\S*\] ", "", first_line(error, 1000))[:300]


def shard(items: Sequence[T]) -> list[T]:
    """The items of this process."""
    return list(items[dist.get_rank() :: world()]) if world() > 1 else list(items)


def check_share(windows: int) -> None:
    """Raise BillhookError if there are fewer calibration windows than processes."""
    if windows < world():
        both = f"{world()} processes cannot share {windows} calibration windows"
        raise BillhookError(f"{both}: give more --samples, or start fewer processes.")


def rows_per_batch(rows: int, size: int) -> int:
    """Rows in a batch: `size`, or fewer so that every process has a batch; BillhookError for too few rows."""
    check_share(rows)
    return min(size, rows // world())


def all_reduce_(value: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if world() > 1:
        _together(lambda: dist.all_reduce(value))
    return value


def any_rank(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return bool(all_reduce_(torch.tensor(int(flag))).item())


def gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    _together(lambda: dist.all_gather_object(found, value))
    return found


def unshard(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order from which `shard` took them."""
    parts = gather(list(items))
    return [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]


def broadcast_(value: Tensor, owner: int) -> None:
    """Copy a tensor of process `owner`, which may be a view, to all processes, in place."""
    if world() > 1:
        copy = value.contiguous()
        _together(lambda: dist.broadcast(copy, owner))
        value.copy_(copy)


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        _together(dist.barrier)


@contextmanager
def connected() -> Iterator[None]:
    """Raise Interrupted where a connection breaks in a collective that torch starts itself, such as FSDP2's."""
    try:
        yield
    except RuntimeError as error:
        modules = (frame.f_globals.get("__name__") for frame, _ in walk_tb(error.__traceback__))
        if dist.distributed_c10d.__name__ in modules:
            raise _broken(error) from None
        raise


def _together(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError as error:
        raise _broken(error) from None


def _broken(error: RuntimeError) -> Interrupted:
    reason, _, _ = _first_line(error).partition(". ")
    return Interrupted(f"The connection broke ({reason}).")
