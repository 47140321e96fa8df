"""Read GGUF files (llama.cpp's format, version 3 and 2, little-endian) without trusting them.

A file is a header (metadata: key, type, value; tensors: name, shape, type, offset) and the bytes of the tensors. Every
length is compared with the size of the file before anything is read, so that a damaged or hostile file is one error.
Of a file in several parts (NAME-00001-of-00003.gguf), any part stands for all; the metadata is that of the first.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from billhook.errors import BillhookError
from billhook.store.gguf_types import decoded, type_name, type_size

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_MOST_DIMENSIONS = 4
_PART = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class GgufValue:
    """A value of the metadata with its type's number, and that of an array's elements; strings in arrays are bytes."""

    value: Any
    type: int
    element: int | None = None


@dataclass(frozen=True)
class GgufEntry:
    """A tensor: `type` as in `q4_k`, `shape` [..., out, in], and the positions of its bytes in the file `path`."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    stop: int
    path: Path


@dataclass(frozen=True)
class GgufFile:
    """The header of a file, or of all its parts: `path` is the first."""

    path: Path
    metadata: dict[str, GgufValue]
    tensors: dict[str, GgufEntry]
    parts: tuple[Path, ...]

    @property
    def arch(self) -> str:
        """The name of the architecture; raises BillhookError for a file that holds no model."""
        found = self.metadata.get("general.architecture")
        if found is None or found.value == "imatrix":
            raise BillhookError(f"{self.path} holds no model: it is an importance matrix (--imatrix).")
        return str(found.value)

    @cached_property
    def _bytes(self) -> dict[Path, np.ndarray]:
        return {path: np.memmap(path, np.uint8, "r") for path in self.parts}

    def raw(self, entry: GgufEntry) -> np.ndarray:
        """The bytes of a tensor, memory-mapped: uint8 [..., out, n]."""
        return self._bytes[entry.path][entry.start : entry.stop].reshape(*entry.shape[:-1], -1)

    def values(self, entry: GgufEntry) -> np.ndarray:
        """The values of a tensor, float32, writable; raises BillhookError for a type that `gguf` cannot decode."""
        try:
            values = decoded(self.raw(entry), entry.type)
        except NotImplementedError:
            raise BillhookError(f"{self.path}: {entry.name} is {entry.type}, which cannot be decoded.") from None
        return np.require(values.reshape(entry.shape), requirements="W")


def require_gguf() -> None:
    """Raise BillhookError unless the package `gguf` is installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise BillhookError("GGUF files need the package gguf: pip install gguf.") from None


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a file, and those of its other parts.

    Raises BillhookError for a file that is damaged, and for parts that are missing or do not belong together.
    """
    require_gguf()
    metadata, tensors = _read_header(path)
    said, count, paths = metadata.get("split.count"), _number(metadata, "split.count"), gguf_parts(path)
    if said is None or count == 1:
        return GgufFile(path, metadata, tensors, (path,))
    missing = [part.name for part in paths if not part.is_file()]
    if not count or count != len(paths) or missing:
        names = "put all of them into one folder as NAME-00001-of-00003.gguf and so on"
        lacking = f" ({missing[0]} is missing)" if missing and count == len(paths) else ""
        raise BillhookError(f"{path} is one of {said.value!r:.20} parts{lacking}: {names}.")
    headers = [_read_header(part) for part in paths]
    together = {name: entry for _, entries in headers for name, entry in entries.items()}
    numbers = [(_number(own, "split.no"), _number(own, "split.count")) for own, _ in headers]
    wanted = _number(headers[0][0], "split.tensors.count")
    whole = sum(len(entries) for _, entries in headers) == len(together) and wanted in (None, len(together))
    if numbers != [(number, count) for number in range(count)] or not whole:
        raise BillhookError(f"The {count} parts of {paths[0]} do not belong together: download them again.")
    first = {key: value for key, value in headers[0][0].items() if not key.startswith("split.")}
    if "general.architecture" not in first:
        raise BillhookError(f"{paths[0]} is damaged (no general.architecture): download it again.")
    return GgufFile(paths[0], first, together, tuple(paths))


def gguf_parts(path: Path) -> list[Path]:
    """The parts of a file that is named like one of several, in order, or the file alone."""
    found = _PART.fullmatch(path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}-{number:05}-of-{found[2]}.gguf") for number in range(1, int(found[2]) + 1)]


def gguf_inside(folder: Path) -> Path | None:
    """The one GGUF file in a folder, or the first part of the only one; None where there is none, or several."""
    inside = sorted(folder.glob("*.gguf"))
    return inside[0] if inside and inside == sorted(gguf_parts(inside[0])) else None


def _number(metadata: dict[str, GgufValue], key: str) -> int | None:
    value = metadata[key].value if key in metadata else None
    return value if type(value) is int else None


def _read_header(path: Path) -> tuple[dict[str, GgufValue], dict[str, GgufEntry]]:
    try:
        with open(path, "rb") as file:
            found = _Header(path, file.read(8), path.stat().st_size, lambda count: file.read(count))
            return found.read()
    except OSError as error:
        raise BillhookError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, KeyError, struct.error, OverflowError) as error:
        raise BillhookError(f"{path} is not a GGUF file, or it is damaged ({error}): download it again.") from None


class _Header:
    """Reads a header from the start; raises ValueError where it is damaged."""

    def __init__(self, path: Path, start: bytes, size: int, read: Callable[[int], bytes]) -> None:
        if start[:4] != b"GGUF" or start[4:] not in (b"\x02\0\0\0", b"\x03\0\0\0"):
            raise ValueError("it does not begin like one")
        self.path, self.size, self.place, self._read = path, size, 8, read

    def read(self) -> tuple[dict[str, GgufValue], dict[str, GgufEntry]]:
        """The metadata and the tensors."""
        tensors, keys = self.take("Q"), self.take("Q")
        self.fits(tensors * 24 + keys * 13)
        metadata: dict[str, GgufValue] = {}
        for _ in range(keys):
            key = self.text().decode()
            if key in metadata:
                raise ValueError(f"{key[:100]!r} twice")
            metadata[key] = self.value(self.take("I"))
        kind = getattr(metadata.get("general.type"), "value", None)
        # a part that has no metadata of its own, and an importance matrix, need none
        free = (_number(metadata, "split.no") or 0) > 0 or kind == "imatrix"
        if not free and not isinstance(getattr(metadata.get("general.architecture"), "value", None), str):
            raise ValueError("general.architecture is no string")
        listed = [self.entry() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", GgufValue(32, _UINT32))
        if alignment.type != _UINT32 or alignment.value < 1 or alignment.value & (alignment.value - 1):
            raise ValueError("bad alignment")
        start = -(-self.place // alignment.value) * alignment.value
        found = {entry.name: self.placed(entry, start) for entry in listed}
        if len(found) < len(listed):
            raise ValueError("two tensors have the same name")
        end = start
        for entry in sorted(found.values(), key=lambda entry: entry.start):
            if entry.start < end or (entry.start - start) % alignment.value:
                raise ValueError(f"the values of {entry.name[:100]!r} are not where they can be")
            end = entry.stop
        return metadata, found

    def fits(self, count: int) -> None:
        """Raise ValueError unless `count` more bytes are in the file."""
        if count > self.size - self.place:
            raise ValueError("it ends too early")

    def next(self, count: int) -> bytes:
        """The next bytes."""
        self.fits(count)
        self.place += count
        return self._read(count)

    def take(self, kind: str) -> Any:
        """The next number."""
        return struct.unpack(f"<{kind}", self.next(struct.calcsize(kind)))[0]

    def text(self) -> bytes:
        """The next string."""
        return self.next(self.take("Q"))

    def value(self, kind: int) -> GgufValue:
        """The next value of the metadata."""
        if kind == _STRING:
            return GgufValue(self.text().decode(), kind)
        if kind != _ARRAY:
            return GgufValue(self.take(self.code(kind)), kind)
        element, count = self.take("I"), self.take("Q")
        if element == _STRING:
            self.fits(8 * count)
            return GgufValue([self.text() for _ in range(count)], kind, element)
        code = self.code(element)
        return GgufValue(
            list(struct.unpack(f"<{count}{code}", self.next(count * struct.calcsize(code)))), kind, element
        )

    def code(self, kind: int) -> str:
        """How `struct` reads a number of a type."""
        if kind not in _SCALARS:
            raise ValueError(f"a value of the type {kind}")
        return _SCALARS[kind]

    def entry(self) -> GgufEntry:
        """The next tensor; its positions are relative to the first one's."""
        name, dimensions = self.text().decode(), self.take("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions")
        shape = tuple(reversed([self.take("Q") for _ in range(dimensions)]))
        kind = type_name(self.take("I"))
        _, block, size = type_size(kind)
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"{name[:100]!r} has the shape {list(shape)}")
        start = self.take("Q")
        return GgufEntry(name, kind, shape, start, start + math.prod(shape) // block * size, self.path)

    def placed(self, entry: GgufEntry, start: int) -> GgufEntry:
        """A tensor with its positions in the file."""
        if start + entry.stop > self.size:
            raise ValueError(f"the values of {entry.name[:100]!r} are not all there")
        return replace(entry, start=start + entry.start, stop=start + entry.stop)
