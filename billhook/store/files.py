"""Atomic writes, checksums, and reading untrusted files."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, DiskFull, JobError, out_of_memory
from billhook.store.layout import GRADIENTS, RECORD

_CHUNK = 1 << 24
_OF_MODELS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", RECORD)


def cache_folder() -> Path | None:
    """The folder for what can be made again; `BILLHOOK_CACHE` names another one, or `0` for none."""
    named = os.environ.get("BILLHOOK_CACHE", "")
    if named == "0":
        return None
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "billhook"


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """`replace_file` with errors for users: BillhookError for a folder that cannot be written, DiskFull for a full
    disk, JobError for another failure."""
    check_writable(path)
    try:
        replace_file(path, write)
    except OSError as error:
        raise write_failure(path, error) from None


def write_failure(path: Path, error: OSError) -> JobError:
    """The error for a file that could not be written."""
    kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else JobError
    return kind(f"Cannot write {path}: {error.strerror or error}. Free some space or choose another place.")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in the same folder, flush it to disk, and rename it to `path`.

    Raises OSError; the temporary file is removed then.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(path: Path) -> None:
    """Raise BillhookError unless a file can be written at `path`."""
    if not path.parent.is_dir():
        raise BillhookError(f"Cannot write {path}: the folder {path.parent} does not exist. Create it first.")
    if path.is_dir():
        raise BillhookError(f"Cannot write {path}: it is a directory. Name a file.")
    if not os.access(path.parent, os.W_OK):
        raise BillhookError(f"Cannot write {path}: the folder {path.parent} is not writable.")


def check_new_file(output: Path, *read: str | Path | None) -> None:
    """Raise BillhookError for a file that cannot be written, or that would replace one of those that are `read`, or one
    that a model directory consists of."""
    check_writable(output)
    path = output.resolve()
    of_model = path.name in _OF_MODELS or (path.suffix == ".safetensors" and path.name != GRADIENTS)
    inside = of_model and (path.parent / "config.json").is_file()
    if path.is_file() and (inside or path in {Path(one).expanduser().resolve() for one in read if one is not None}):
        raise BillhookError(f"The output {output} is a file of the model, or one that is read: choose another.")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, with its own line ends, atomically."""
    write_atomic(path, lambda temporary: temporary.write_bytes(encoded(text)))


def write_json(path: Path, value: Any, *, own: bool = True) -> None:
    """Write `value` as `json_text`, atomically."""
    write_text(path, json_text(value, own=own))


def encoded(text: str) -> bytes:
    """`text` as UTF-8, lone surrogates as they are written in json, such as \\udce9.

    They stand for the bytes of a file name that are not UTF-8.
    """
    return text.encode(errors="backslashreplace")


def json_text(value: Any, indent: int | None = 1, *, own: bool = True) -> str:
    """`value` as json (in one line if `indent` is None) with a final newline; NaN and infinity are refused, except in
    files that are not Billhook's `own`, such as configurations that set a limit to Infinity."""
    return encoded(json.dumps(value, indent=indent, allow_nan=not own, ensure_ascii=False)).decode() + "\n"


def copy_files(source: Path, folder: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Copy the `wanted` files below `source`, except those in hidden folders and `__pycache__`; paths are relative."""
    copied = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts[:-1])
        if hidden or not path.is_file() or not wanted(relative):
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / relative)
        copied.append(relative)
    return copied


def read_json(path: Path, what: str, *, own: bool = True) -> dict[str, Any]:
    """Read a json object; raises BillhookError where that fails, naming the kind of file by `what`.

    In Billhook's `own` files a number that is not finite as a float is refused, and a byte order mark, which
    `transformers` refuses in its files, is skipped.
    """
    try:
        value = (
            parse_json(path.read_text(encoding="utf-8-sig")) if own else json.loads(path.read_text(encoding="utf-8"))
        )
    except FileNotFoundError:
        raise BillhookError(f"There is no {what} at {path}.") from None
    except OSError as error:
        raise BillhookError(f"Cannot read the {what} {path}: {error.strerror or error}.") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as error:
        raise BillhookError(f"{path} is not a {what}: it is not valid json ({error}).") from None
    if not isinstance(value, dict):
        raise BillhookError(f"{path} is not a {what}: the top level must be an object, found {type(value).__name__}.")
    return value


def parse_json(text: str) -> Any:
    """The value of a json text; raises ValueError (also for a number that is not finite) or RecursionError."""
    value = json.loads(text)
    _check_finite(value, "it")
    return value


def _check_finite(value: Any, place: str) -> None:
    if isinstance(value, float | int) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{place} is {str(value)[:20]}, which is not a finite number")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _check_finite(item, f"{place}, {key}".removeprefix("it, "))


@contextmanager
def untrusted(what: str, advice: str) -> Iterator[None]:
    """Turn an error of the code inside, which uses what a file holds, into BillhookError: `what` failed, and `advice`.

    Errors of the system and of memory are raised as they are. The error itself is the cause of the new one.
    """
    try:
        yield
    except Exception as error:
        system = isinstance(error, OSError) and error.errno is not None
        if isinstance(error, BillhookError) or system or out_of_memory(error):
            raise
        raise BillhookError(f"{what} ({in_one_line(error)}). {advice}") from error


def repair(path: Path) -> str:
    """What to do about a file or directory that `transformers` cannot load."""
    if encoded(str(path)).decode() != str(path):
        return "Rename it: its packages open only paths that are UTF-8."
    return "Repair the file, or copy or download it again."


def in_one_line(error: BaseException) -> str:
    """An error's class and the beginning of its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(" .:")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(files: Mapping[str, str]) -> str:
    """One SHA-256 for several files, given the SHA-256 of each by name: over name and checksum, in order of name."""
    lines = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(encoded(lines)).hexdigest()


def digest_ranges(digest: "hashlib._Hash", path: Path, ranges: Iterable[tuple[int, int]]) -> None:
    """Update `digest` with the bytes [start, stop) of a file, as far as they exist."""
    with open(path, "rb") as file:
        for start, stop in ranges:
            file.seek(start)
            for position in range(start, stop, _CHUNK):
                digest.update(file.read(min(_CHUNK, stop - position)))
