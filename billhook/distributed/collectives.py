"""One run in several processes, as torchrun starts them; everything here does nothing in a run of one process.

The calibration windows are shared out among the processes (`mine`), each statistic is summed over them (`all_reduce_`),
so that all of them know what one process would know, up to the order of floating-point sums; the layers of a block are
then shared out, and what each made is given to all (`broadcast_`). A process that is lost ends the others within
seconds, with an error that names it (`billhook.distributed.heartbeat`).
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from billhook.distributed.heartbeat import AGAIN, Heartbeat
from billhook.distributed.torchrun import started
from billhook.errors import BillhookError, Interrupted

T = TypeVar("T")
TIMEOUT = timedelta(hours=2)  # a process may wait for the others as long as the largest layer takes
PATIENCE = timedelta(seconds=30)  # with the store


def world() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def distributed(device: str) -> Iterator[None]:
    """Take part in the run that torchrun started, if it did."""
    if not started():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # numbers and records are exchanged from the CPU on a GPU too
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
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be lost


def _heartbeat() -> Heartbeat:
    """Start this process's signs of life, which go a way of their own to the store."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=PATIENCE)
    heart = Heartbeat(store, dist.get_rank(), world(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    dist.barrier()
    heart.start()
    return heart


def _end(heart: Heartbeat, error: BaseException) -> NoReturn:
    """End a run that was stopped or broke: raise what happened, with the name of the process that is to blame if it is
    another one."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # torchrun sends it when a process is lost; this one is ending already
    lost = heart.lost()
    heart.leave("" if lost else _first_line(error))
    if lost:
        raise Interrupted(
            " ".join([lost, *([said] if (said := str(error)) else []), *([] if "--resume" in said else [AGAIN])])
        ) from None
    if isinstance(error, KeyboardInterrupt) and dist.get_rank():
        raise Interrupted("Stopped; process 0 says what is kept.") from None
    raise error


def _first_line(error: BaseException) -> str:
    """What an error says, in a line, without the place in the source of a library that some begin with."""
    return re.sub(r"^\[\S*\] ", "", (str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def shard(items: Sequence[T]) -> list[T]:
    """The items that this process takes."""
    return list(items[dist.get_rank() :: world()]) if world() > 1 else list(items)


def check_share(windows: int) -> None:
    """Raise BillhookError unless every process gets a calibration window."""
    if windows < world():
        raise BillhookError(
            f"{world()} processes cannot share {windows} calibration windows: give more --samples, or start fewer."
        )


def rows_per_batch(rows: int, size: int) -> int:
    """Rows in a batch: `size`, or fewer so that every process gets a batch; BillhookError if there are too few rows."""
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
    """What each process has, in the order of the processes."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    _together(lambda: dist.all_gather_object(found, value))
    return found


def broadcast_(value: Tensor, owner: int) -> None:
    """Give every process what process `owner` has in a tensor, which may be a view, in place."""
    if world() > 1:
        copy = value.contiguous()
        _together(lambda: dist.broadcast(copy, owner))
        value.copy_(copy)


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        _together(dist.barrier)


def _together(work: Callable[[], Any]) -> None:
    try:
        work()
    except RuntimeError as error:
        raise Interrupted(f"The connection broke ({_first_line(error)}).") from None
