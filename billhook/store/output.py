"""Atomic directories: written under another name in the same folder, flushed to the disk, and renamed at the end.

After a failure of any kind there is no new output, and an old one is unchanged.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from billhook.errors import BillhookError, DiskFull, JobError
from billhook.store.files import fsync


def absolute(output: str | Path) -> Path:
    """The absolute path of an output that is given."""
    return Path(output).expanduser().resolve()


def check_output(output: Path, source: Path | None = None, *, overwrite: bool = False, needed: int = 0) -> Path:
    """Check, before any work, that `output` can be written; returns it resolved.

    Raises BillhookError when it is a file, is not empty (unless `overwrite` and it is a model directory), is inside the
    source or contains it, contains the current folder, or its folder does not exist; JobError when fewer than `needed`
    bytes are free.
    """
    output = absolute(output)
    if source is not None:
        check_apart(output, source)
    _check_folder(output, output.parent)
    with suppress(FileNotFoundError):  # the current folder is gone
        if Path.cwd().is_relative_to(output):
            raise BillhookError(
                f"The output {output} would be replaced while it is the current folder: choose another, or run "
                "this outside."
            )
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise BillhookError(
                f"The output {output} exists and is not empty: choose another, or allow replacing it (--overwrite)."
            )
        if not (output / "config.json").is_file():
            raise BillhookError(
                f"The output {output} is not empty and not a model directory, so it is not replaced: choose another."
            )
    check_room(output, needed)
    return output


def check_apart(output: Path, source: Path, what: str = "source model") -> None:
    """Raise BillhookError where `output`, which is resolved, contains a model that is read, or is inside it."""
    if output.is_relative_to(source.resolve()) or source.resolve().is_relative_to(output):
        raise BillhookError(f"The output {output} contains the {what} {source} or is inside it: choose another output.")


def check_room(output: Path, needed: int) -> None:
    """Raise DiskFull when fewer than `needed` bytes are free where `output` is to be written."""
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        raise DiskFull(f"The disk of {output.parent} is too full: {_size(needed)} needed, {_size(free)} free.")


def check_record_place(folder: Path, record: str) -> None:
    """Raise BillhookError unless `folder` can hold the file `record`: it is new in an existing parent, empty, or holds
    that file already."""
    _check_folder(folder, folder if folder.exists() else folder.absolute().parent)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / record).exists():
        raise BillhookError(f"The output {folder} is not empty and holds no {record}: choose another.")


def _check_folder(output: Path, parent: Path) -> None:
    """Raise BillhookError unless `output` is a directory or can be one, and `parent` exists and is writable."""
    if output.exists() and not output.is_dir():
        raise BillhookError(f"The output {output} is a file: choose a directory.")
    if not parent.is_dir():
        raise BillhookError(f"Cannot write {output}: the folder {parent} does not exist. Create it first.")
    if not os.access(parent, os.W_OK):
        raise BillhookError(f"Cannot write {output}: the folder {parent} is not writable.")


@contextmanager
def staging(output: Path, needed: int) -> Iterator[Path]:
    """Yield a hidden directory in the same folder; it becomes `output` when the body ends, and is deleted when it
    fails.

    Raises JobError for a failure of the disk; its message names the `needed` bytes.
    """
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        yield folder
        flush(folder)
        put_in_place(folder, output)
    except (OSError, SafetensorError) as error:
        raise JobError(f"{failure(error, output, needed)} Nothing was left behind.") from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def failure(error: OSError | SafetensorError, output: Path, needed: int) -> str:
    """A sentence about an error while writing `output`, which needs `needed` bytes."""
    # safetensors reports a full disk only in its message
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        free = shutil.disk_usage(output.parent).free
        return f"The disk is full: writing {output} needs {_size(needed)}, {_size(free)} are free. Make room."
    return f"Cannot write {output}: {getattr(error, 'strerror', None) or error}."


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def flush(folder: Path) -> None:
    """Flush everything to the disk, and give the directory the permissions of a plain mkdir."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)


def put_in_place(folder: Path, output: Path) -> None:
    """Rename `folder`, which is flushed, to `output`; an old output is moved aside first and removed last."""
    old = output.with_name(f".{output.name}.replaced")
    if output.is_dir() and any(output.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        os.rename(output, old)
    try:
        os.rename(folder, output)
        fsync(output.parent)
    except BaseException:
        if old.exists() and not output.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
