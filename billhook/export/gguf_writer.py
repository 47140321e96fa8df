"""Write a GGUF file: a header made with the `gguf` package, and the bytes of the tensors, part by part."""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from billhook.errors import BillhookError
from billhook.store.files import check_writable, untrusted, write_atomic
from billhook.store.gguf_types import type_size
from billhook.store.output import check_room

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ALIGNMENT = 32


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
class Written:
    """What was written: the number of tensors of each type, and notes on what llama.cpp computes otherwise."""

    path: Path
    bytes: int
    types: dict[str, int]
    notes: list[str]


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
) -> Written:
    """Write the file; raises BillhookError where `output` cannot be written, and JobError for a full disk."""
    check_writable(output)
    check_room(output, sum(entry.bytes for entry in entries))
    write(writer, entries, output, progress)
    return Written(output, output.stat().st_size, dict(Counter(entry.type for entry in entries)), notes)


def whole_size(writer: "GGUFWriter", entries: Iterable[Entry]) -> int:
    """The bytes of the file that `write` would write."""
    with tempfile.TemporaryDirectory(prefix="billhook.") as folder:
        _write_header(writer, Path(folder) / "header.gguf")
        size = (Path(folder) / "header.gguf").stat().st_size
    for entry in entries:
        size += -size % _ALIGNMENT + entry.bytes
    return size + -size % _ALIGNMENT


def _write_header(writer: "GGUFWriter", path: Path) -> None:
    with closing(writer), untrusted("The configuration does not fit a GGUF file", "Check config.json."):
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def write(
    writer: "GGUFWriter", entries: Iterable[Entry], output: Path, progress: Callable[[str], None] = lambda tensor: None
) -> None:
    """Write a file whose tensors were announced, whole or not at all."""

    def fill(path: Path) -> None:
        _write_header(writer, path)
        with open(path, "ab") as file:
            for entry in entries:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                start = file.tell()
                for part in entry.parts():
                    file.write(np.ascontiguousarray(part).data)
                assert file.tell() == start + entry.bytes, entry.name
                progress(entry.name)
            file.write(bytes(-file.tell() % _ALIGNMENT))

    write_atomic(output, fill)


def _file_type(entries: Iterable[Entry]) -> int:
    """The number of the file's type: that of most weights."""
    from gguf import LlamaFileType

    weights: Counter[str] = Counter()
    for entry in entries:
        weights[entry.type.upper()] += math.prod(entry.shape) if len(entry.shape) > 1 else 0
    most = max(weights, key=weights.__getitem__)
    names = ("ALL_F32",) if most == "F32" else (f"MOSTLY_{most}", f"MOSTLY_{most}_M", f"MOSTLY_{most}_MOE")
    return next((LlamaFileType[name] for name in names if name in LlamaFileType.__members__), LlamaFileType.GUESSED)
