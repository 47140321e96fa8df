"""The folder of an unfinished run: locked by one process, not mistaken for anything else, and what is said when a run
ends early."""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError

from billhook.errors import BillhookError, DiskFull, Interrupted, JobError, out_of_memory
from billhook.steps.state import STATE, State, check_same_run, partial_folder, unfinished_run
from billhook.store.layout import LEVELS
from billhook.store.output import check_output, failure
from billhook.store.shards import INDEX

_ENDINGS = KeyboardInterrupt, OSError, MemoryError, RuntimeError, Interrupted, DiskFull, SafetensorError


class Run(Protocol):
    """A run that writes the folder."""

    @property
    def worth_keeping(self) -> bool:
        """Whether something is finished with which it can go on."""
        ...

    @property
    def reached(self) -> str:
        """How far it is, as the beginning of a sentence that goes on with "kept in FOLDER"."""
        ...


@dataclass
class UnfinishedFolder:
    """The locked folder, which is deleted at the end unless `keep` is true, and its run, once it has begun."""

    folder: Path
    output: Path
    keep: bool
    run: Run | None = None

    def start(self, new: State, source: Path, *, resume: bool, overwrite: bool, room: int = 0) -> State:
        """The state of the run to resume, or the `new` one, for which everything in the folder is deleted.

        Raises BillhookError where the run to resume has another identity, or the output cannot be written; JobError
        where a new run lacks `room` bytes.
        """
        state = unfinished_run(self.output, resume=resume, overwrite=overwrite)
        check_output(self.output, source, overwrite=overwrite, needed=room if state is None else 0)
        if state is None:
            self.keep = False
            empty_folder(self.folder)
            state = new
        check_same_run(state.identity, new.identity, self.folder)
        return state


@contextmanager
def unfinished_folder(output: Path, written: Collection[str], needed: int) -> Iterator[UnfinishedFolder]:
    """Lock the folder of a run that writes the files `written` and needs `needed` bytes, and decide what becomes of it.

    Raises BillhookError where another run uses the folder; Interrupted for a run that was stopped, or ran out of disk
    or memory, where it is worth keeping. After other errors, which would occur again, the folder is deleted.
    """
    folder = partial_folder(output)
    lock = lock_folder(folder)
    foreign = foreign_file(folder, written)
    found = UnfinishedFolder(folder, output, keep=(folder / STATE).exists() or bool(foreign))
    try:
        check_not_foreign(foreign, folder, output)
        yield found
    except _ENDINGS as error:
        found.keep = found.keep or (found.run is not None and found.run.worth_keeping)
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        kept = f"{found.run.reached} kept in {folder}" if found.keep and found.run is not None else ""
        raise ended_early(error, needed, output, kept) from None
    except BillhookError:
        found.keep = found.keep and found.run is None
        raise
    finally:
        if not found.keep:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def ended_early(error: BaseException, needed: int, output: Path, kept: str) -> BaseException:
    """The error for a run that ended early. It says how to resume it where something is finished (`kept` says what),
    or how many bytes are `needed`."""
    if not kept and not isinstance(error, OSError | SafetensorError):
        return error
    what = "Stopped"
    if isinstance(error, OSError | SafetensorError):
        what = failure(error, output, needed).rstrip(".")
    elif isinstance(error, MemoryError | RuntimeError):
        what = "Out of memory"
    elif isinstance(error, Interrupted | DiskFull):
        what = str(error).rstrip(".")
    if not kept:
        return JobError(f"{what}. Nothing was left behind.")
    stopped = isinstance(error, KeyboardInterrupt) or (isinstance(error, Interrupted) and error.stopped)
    return Interrupted(f"{what}. {kept}: continue with the same command and --resume.", stopped=stopped, advised=True)


def lock_folder(folder: Path) -> int:
    """Create the folder and lock it until the process ends; raises BillhookError when another process has locked it."""
    while True:
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            place = f"{folder}, where the output would be written,"
            raise BillhookError(f"{place} is a file: move it away, or choose another output.") from None
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise BillhookError(f"Another run is writing {folder}: wait for it, or choose another output.") from None
        except FileNotFoundError:  # the other run has just renamed the folder
            pass
        os.close(handle)


def foreign_file(folder: Path, written: Collection[str]) -> str | None:
    """The name of a file in `folder` that cannot be from an unfinished run, which writes the files `written`, and must
    not be deleted."""
    if (folder / STATE).exists():
        return None
    own, temporary = {INDEX, LEVELS, *written}, (f".{STATE}.", f".{LEVELS}.")
    names = (path.name for path in folder.iterdir())
    return min((name for name in names if name not in own and not name.startswith(temporary)), default=None)


def check_not_foreign(foreign: str | None, folder: Path, output: Path) -> None:
    """Raise BillhookError for a `foreign_file`."""
    if foreign:
        raise BillhookError(
            f"{folder}, where {output} would be written, holds {foreign}, which is not from a run: move the folder "
            "away."
        )


def empty_folder(folder: Path, except_for: Sequence[str] = ()) -> None:
    """Delete everything in a folder but some files."""
    for path in folder.iterdir():
        if path.name in except_for:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
