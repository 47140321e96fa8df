"""Write a GGUF file: a header made with the `gguf` package, and the bytes of the tensors, part by part."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from billhook.errors import BillhookError
from billhook.store.files import check_writable, fsync, untrusted, write_atomic, write_failure
from billhook.store.gguf_types import type_size
from billhook.store.output import check_room

if TYPE_CHECKING:
    from gguf import GGUFWriter

ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: name, type (`q4_k`), shape [..., out, in], and its bytes in order, in parts."""

    name: str
    type: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def bytes(self) -> int:
        """The size of the tensor in the file."""
        return math.prod(byte_shape(self.name, self.shape, self.type))


@dataclass(frozen=True)
class ExportReport:
    """What was written: the number of tensors of each type, and notes on what llama.cpp computes otherwise; `path` is
    the first of several `parts`."""

    path: Path
    bytes: int
    types: dict[str, int]
    notes: list[str]
    parts: Sequence[Path] = ()


def byte_shape(name: str, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """[..., out, bytes of a row]; raises BillhookError for an unknown type, and for blocks that do not fill a row."""
    try:
        _, block, size = type_size(kind)
    except KeyError:
        raise BillhookError(f"{name}: {kind} is no type of GGUF files.") from None
    if shape[-1] % block:
        raise BillhookError(f"{name} has rows of {shape[-1]} weights, which blocks of {block} ({kind}) do not fill.")
    return (*shape[:-1], shape[-1] // block * size)


def add_tensors(writer: "GGUFWriter", entries: Iterable[Entry]) -> None:
    """Announce the tensors, whose number of parameters the metadata needs."""
    for entry in entries:
        kind: Any = type_size(entry.type)[0]  # a number serves where the package has no name for it
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, kind)


def add_types(writer: "GGUFWriter", entries: Sequence[Entry]) -> None:
    """Complete the metadata of a model with what its tensors are."""
    import gguf

    writer.add_file_type(_file_type(entries))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def finish(
    writer: "GGUFWriter",
    entries: Sequence[Entry],
    notes: list[str],
    output: Path,
    progress: Callable[[str], None],
) -> ExportReport:
    """Write the file; raises BillhookError where `output` cannot be written, and JobError for a full disk."""
    check_writable(output)
    check_room(output, sum(entry.bytes for entry in entries))
    parts = write(writer, entries, output, progress)
    size = sum(part.stat().st_size for part in parts)
    return ExportReport(parts[0], size, dict(Counter(entry.type for entry in entries)), notes, parts)


def whole_size(writer: "GGUFWriter", entries: Iterable[Entry]) -> int:
    """The bytes of the file, or of all its parts, that `write` would write."""
    counts, total, rest = [len(tensors) for tensors in writer.tensors], 0, iter(entries)
    with tempfile.TemporaryDirectory(prefix="billhook.") as folder:
        for path, count in zip(_write_header(writer, Path(folder) / "header.gguf"), counts, strict=True):
            size = path.stat().st_size
            for entry in islice(rest, count):
                size += -size % ALIGNMENT + entry.bytes
            total += size + -size % ALIGNMENT
    return total


def _write_header(writer: "GGUFWriter", path: Path) -> list[Path]:
    """Write the headers of all parts of a file called `path`; returns their paths."""
    with closing(writer), untrusted("The configuration does not fit a GGUF file", "Check config.json."):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    return writer.format_shard_names(path)


def write(
    writer: "GGUFWriter", entries: Iterable[Entry], output: Path, progress: Callable[[str], None] = lambda tensor: None
) -> list[Path]:
    """Write a file whose tensors were announced, whole or not at all; returns its path, or those of its parts.

    Where the writer splits files, the parts are NAME-00001-of-00003.gguf and so on, each with its share of the tensors.
    """
    counts, rest = [len(tensors) for tensors in writer.tensors], iter(entries)

    def fill(path: Path) -> None:
        for part, count in zip(_write_header(writer, path), counts, strict=True):
            _append(part, islice(rest, count), progress)

    if len(counts) == 1:
        write_atomic(output, fill)
        return [output]
    check_writable(output)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as folder:
            fill(Path(folder) / output.name)
            made = sorted(Path(folder).iterdir())
            for path in made:
                fsync(path)
                path.chmod(0o644)
            return [path.replace(output.parent / path.name) for path in made]
    except OSError as error:
        raise write_failure(output, error) from None


def _append(path: Path, entries: Iterable[Entry], progress: Callable[[str], None]) -> None:
    """Add the bytes of tensors to a file that has its header."""
    with open(path, "ab") as file:
        for entry in entries:
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            for part in entry.parts():
                file.write(np.ascontiguousarray(part).data)
            assert file.tell() == start + entry.bytes, entry.name
            progress(entry.name)
        file.write(bytes(-file.tell() % ALIGNMENT))


def _file_type(entries: Iterable[Entry]) -> int:
    """The number of the file's type: that of most weights."""
    from gguf import LlamaFileType

    weights: Counter[str] = Counter()
    for entry in entries:
        weights[entry.type.upper()] += math.prod(entry.shape) if len(entry.shape) > 1 else 0
    most = max(weights, key=weights.__getitem__)
    names = ("ALL_F32",) if most == "F32" else (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_MOE")
    return next((LlamaFileType[name] for name in names if name in LlamaFileType.__members__), LlamaFileType.GUESSED)
