"""Runs in copies of this process, which are killed, or whose file operations fail; what they leave is continued and
compared."""

import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import contents

from billhook import prune
from billhook.errors import BillhookError, Interrupted
from billhook.steps.state import STATE, partial_folder
from billhook.steps.verify import verify

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"}
IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
MAGNITUDE = {"sparsity": 0.5, "criterion": "magnitude"}
SPARSEGPT = {"sparsity": 0.5, "criterion": "sparsegpt", "calibration": IDS, "dtype": "float32", "batch_size": 2}
GBLM = {"sparsity": 0.5, "criterion": "gblm", "calibration": IDS}
survived: dict[str, int] = {}


def start(work: Callable[[], Any], said: Path) -> int:
    """Do `work` in a copy of this process; returns its number. It ends with 0, 1 for a failed job, 2 for a mistake, 3
    for a bug."""
    child = os.fork()
    if child:
        return child
    code, text = 0, ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
    except BillhookError as error:
        code, text = error.exit_code, str(error)
    except KeyboardInterrupt:
        code, text = 1, "stopped"
    except OSError as error:
        code, text = 1, str(error)
    except BaseException:
        code, text = 3, traceback.format_exc()
    finally:
        try:
            said.write_text(text)
        finally:
            os._exit(code)


def wait(child: int) -> int:
    """The exit code of a copy, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pruning(source: Path, output: Path, **fields: Any) -> Callable[[], Any]:
    """The work of the trials."""
    return lambda: prune(source, output=output, **fields)


class Operations:
    """Counts the operations on files of this process, and lets something happen before number `at` (from 1)."""

    def __init__(self, at: int = 0, happen: Callable[[str, Any], None] | None = None) -> None:
        self.count, self.at, self.happen, self.names = 0, at, happen, list[str]()

    def install(self) -> "Operations":
        """From now on, for as long as the process lives."""
        sys.addaudithook(self._audit)
        for name in ("pwrite", "fsync", "posix_fallocate", "ftruncate"):
            setattr(os, name, self._counted(name, getattr(os, name)))
        return self

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            self._one(event, None)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self._one(name, args)
            return real(*args)

        return counted

    def _one(self, name: str, args: Any) -> None:
        self.count += 1
        self.names.append(name)
        if self.count == self.at and self.happen is not None:
            self.happen(name, args)


REAL_PWRITE = os.pwrite


def kill(name: str, args: Any) -> None:
    """Die before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def tear(name: str, args: Any) -> None:
    """Die in the middle of a write."""
    if name == "pwrite":
        REAL_PWRITE(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
    kill(name, args)


def full(name: str, args: Any) -> None:
    """Fail as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken(name: str, args: Any) -> None:
    """Fail as on a broken disk."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


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
        unfinished = path.is_dir() and (path / STATE).exists()
        if path.is_dir() and (path / "billhook.json").exists() and not (unfinished and path.name.endswith(".partial")):
            assert verify(path).ok
        elif unfinished:
            assert "--resume" in json.loads((path / STATE).read_text())["unfinished"]
            with pytest.raises(
                BillhookError, match="not finished: resume it with the command that started it and resume=True"
            ):
                verify(path)


def stop_after(source: Path, output: Path, blocks: int, **fields) -> None:
    """Leave a run that was stopped after some blocks."""
    from billhook.steps.prune import PruneRequest, prepare, run

    done = iter(range(100))
    with pytest.raises(
        Interrupted, match=f"Stopped. {blocks} of 3 blocks are finished and kept in .*continue with the same command"
    ):
        run(prepare(PruneRequest(source, output=output, **fields)), stopping=lambda: next(done) + 1 == blocks)
