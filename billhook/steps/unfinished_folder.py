"""The folder of an unfinished run: locked by one process, not mistaken for anything else, and what is said when a run
ends early."""

import fcntl
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors import SafetensorError

from billhook.errors import BillhookError, DiskFull, Interrupted, JobError
from billhook.steps.state import STATE
from billhook.store.layout import LEVELS
from billhook.store.output import failure
from billhook.store.shards import INDEX


def ended_early(error: BaseException, needed: int, output: Path, kept: str) -> BaseException:
    """The error for a run that ended early. It says how to resume it where something is finished (`kept` says what),
    or how many bytes are `needed`."""
    if not kept and not isinstance(error, OSError):
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
    return Interrupted(f"{what}. {kept}: continue with the same command and --resume.")


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
