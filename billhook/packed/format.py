"""The packed format: what is in a packed directory, opened and checked. Imports no torch.

In place of a sparse tensor NAME the safetensors files hold NAME.bitmask, NAME.values and, where needed, NAME.scales and
NAME.signs; `billhook_packed.json` says what they stand for, with a checksum of every tensor and file (docs/formats.md
has the whole description, with a reader of a few lines). Nothing in these files is believed: shapes, sizes and offsets
are compared with each other before anything is read through them, so that a damaged or hostile file is a BillhookError
and never a wild read.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from billhook.errors import BillhookError
from billhook.runtime.layout import MIN_GROUP, PADDING, mask_bytes
from billhook.store.files import read_json, sha256
from billhook.store.layout import PACKED
from billhook.store.shards import Entry, Shard, parse_header, read_shard

VERSION = 1
ITEM = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1}
PARTS = ("bitmask", "values", "scales", "signs")
_AGAIN = "Copy the directory again, or pack the model again."
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Matrix:
    """A packed tensor, seen as a matrix [rows, columns]: [out, in] for a layer, all experts below each other for a 3-D
    tensor.

    `shape` is that of the dense tensor on disk; `transposed` tells that it is [in, out] there. `nnz` values are kept.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    nnz: int
    negative_zeros: int
    int8: bool
    group: int | None

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.shape[-1] if self.transposed else math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor that makes up this one, by its name in the file."""
        mask = ("U8", (self.rows, mask_bytes(self.columns)))
        kind = "I8" if self.int8 else self.dtype
        found = {"bitmask": mask, "values": (kind, (self.nnz + PADDING // ITEM[kind],))}
        if self.int8:
            found["scales"] = (
                "F32",
                (self.rows,) if self.group is None else (self.rows, -(-self.columns // self.group)),
            )
        if self.negative_zeros:
            found["signs"] = mask
        return {f"{self.name}.{part}": facts for part, facts in found.items()}


@dataclass(frozen=True)
class PackedShard:
    """A packed file and the dense file it stands for: the dense one's name, header (length included), tensors and
    SHA-256."""

    name: str
    file: Shard
    header: bytes
    entries: Mapping[str, Entry]
    sha256: str

    @cached_property
    def bytes(self) -> np.ndarray:
        """The packed file, uint8, mapped into memory; writing changes the memory of this process only."""
        return np.memmap(self.file.path, np.uint8, "c")

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor of the packed file, uint8 [n], mapped."""
        entry = self.file.entries[name]
        return self.bytes[entry.start : entry.stop]


@dataclass(frozen=True)
class Packed:
    """A packed directory: its record (billhook_packed.json), packed tensors and files, in the order of the dense
    files."""

    path: Path
    record: Mapping[str, Any]
    matrices: Mapping[str, Matrix]
    shards: tuple[PackedShard, ...]

    @property
    def weights(self) -> int:
        """Weights in packed tensors, zeros included."""
        return sum(math.prod(matrix.shape) for matrix in self.matrices.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the packed tensors' weights that is removed."""
        return 1 - sum(matrix.nnz for matrix in self.matrices.values()) / self.weights

    def checked_files(self, names: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
        """What is wrong with the files beside the weights that `names` chooses, in words."""
        for name, digest in self.record["files"].items():
            if names(name) and not (self.path / name).is_file():
                yield f"{name} is missing."
            elif names(name) and sha256(self.path / name) != digest:
                yield f"{name} is not the file that was packed: its SHA-256 differs."

    def checked_tensors(self) -> Iterator[str]:
        """What is wrong with the bytes of the tensors, in words; reads all of them."""
        places = [(name, shard) for shard in self.shards for name in shard.file.entries]
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda place: crc32(place[1].raw(place[0])), places)
            for (name, shard), found in zip(places, sums, strict=True):
                if found != self.record["tensors"][name]:
                    problem = f"the bytes of {name} are not those that were written, its checksum differs"
                    yield f"{shard.file.path}: {problem}. {_AGAIN}"


def crc32(data: np.ndarray) -> int:
    """The CRC-32 (zlib's) of bytes, uint8 [n]."""
    value = 0
    for start in range(0, len(data), _CHUNK):
        value = zlib.crc32(data[start : start + _CHUNK].data, value)
    return value


def digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 that a record carries of itself: of its json without `digest`, keys sorted, no spaces."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_packed(directory: Path) -> Packed:
    """Open a packed directory and check all but the bytes of its tensors and of the other files.

    Raises BillhookError for a record of another version, one that was changed, and files that are missing, cut off or
    not as recorded.
    """
    path = directory / PACKED
    record = read_json(path, "record of a packed model")
    if record.get("version") != VERSION:
        raise BillhookError(
            f"{path} has version {record.get('version')!r}; this Billhook reads version {VERSION}. Pack the "
            "model again."
        )
    if record.get("digest") != digest(record):
        raise BillhookError(f"{path} was changed after it was written: its own checksum differs. {_AGAIN}")
    try:
        matrices = {name: _matrix(name, facts, record["group"]) for name, facts in record["layers"].items()}
        shards = tuple(_shard(directory, name, facts) for name, facts in record["shards"].items())
        _check_record(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, BillhookError):
            raise
        raise BillhookError(
            f"{path} is not a record of a packed model ({type(error).__name__}: {error}). {_AGAIN}"
        ) from None
    packed = Packed(directory, record, matrices, shards)
    _check_tensors(packed)
    return packed


def _matrix(name: str, facts: Mapping[str, Any], group: int | None) -> Matrix:
    shape = tuple(_whole(size, 1) for size in facts["shape"])
    dtype, int8, transposed = facts["dtype"], facts["values"] == "I8", facts["transposed"]
    if len(shape) not in (2, 3) or dtype not in ("BF16", "F16", "F32") or facts["values"] not in (dtype, "I8"):
        raise ValueError(f"{name} is a {dtype} tensor {list(shape)} with values {facts['values']}")
    if (
        type(transposed) is not bool
        or (transposed and len(shape) == 3)
        or (group is not None and _whole(group, MIN_GROUP) & (group - 1))
    ):
        raise ValueError(f"{name}: transposed {transposed!r}, group {group!r}")
    most = math.prod(shape)
    return Matrix(
        name,
        dtype,
        shape,
        transposed,
        _whole(facts["nnz"], 0, most),
        _whole(facts["negative_zeros"], 0, most),
        int8,
        group,
    )


def _whole(value: Any, least: int, most: int = 2**62) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is not a whole number from {least} to {most}")
    return value


def _shard(directory: Path, name: str, facts: Mapping[str, Any]) -> PackedShard:
    file, text = facts["file"], facts["header"].encode()
    for plain in (name, file):
        if PurePosixPath(plain).name != plain or "\\" in plain or plain in ("", ".", ".."):
            raise ValueError(f"{plain!r} is not a plain file name")
    if not isinstance(facts["sha256"], str):
        raise ValueError("sha256")
    if (directory / file).is_file() and (directory / file).stat().st_size != facts["bytes"]:
        raise BillhookError(
            f"{directory / file} is not {facts['bytes']} bytes long, as it was when it was packed. {_AGAIN}"
        )
    header = len(text).to_bytes(8, "little") + text
    entries = parse_header(directory / PACKED, header)
    return PackedShard(name, read_shard(directory / file), header, entries, facts["sha256"])


def _check_record(record: Mapping[str, Any]) -> None:
    for name, value in record["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not isinstance(value, str):
            raise ValueError(f"the file {name!r}")
    if not isinstance(record["index"], str | None) or not isinstance(record["tensors"], dict) or not record["layers"]:
        raise ValueError("index, tensors or layers")


def _check_tensors(packed: Packed) -> None:
    """Compare the tensors of the packed files with those they should hold, by name, dtype, shape and alignment."""
    left = dict(packed.matrices)
    for shard in packed.shards:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, entry in shard.entries.items():
            matrix = left.pop(name, None)
            if matrix is None:
                expected[name] = (entry.dtype, entry.shape)
            elif (matrix.dtype, matrix.shape) == (entry.dtype, entry.shape):
                expected |= matrix.parts
            else:
                raise BillhookError(
                    f"{packed.path / PACKED}: {name} is not the {entry.dtype} tensor {list(entry.shape)} of the "
                    "dense file."
                )
        found = {name: (entry.dtype, entry.shape) for name, entry in shard.file.entries.items()}
        if found != expected:
            name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise BillhookError(
                f"{shard.file.path}: {name} is {_words(found.get(name))}, expected {_words(expected.get(name))}. "
                f"{_AGAIN}"
            )
        for name, entry in shard.file.entries.items():
            item = (entry.stop - entry.start) // max(1, math.prod(entry.shape))
            if entry.start % (8 if name not in shard.entries and entry.dtype == "U8" else max(1, item)):
                raise BillhookError(
                    f"{shard.file.path}: {name} does not begin at a multiple of its item size. {_AGAIN}"
                )
            if type(packed.record["tensors"].get(name)) is not int:
                raise BillhookError(f"{packed.path / PACKED} has no checksum of {name}. {_AGAIN}")
    if left:
        raise BillhookError(f"{packed.path / PACKED}: {next(iter(left))} is in no file. {_AGAIN}")


def _words(facts: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if facts is None else f"{facts[0]} {list(facts[1])}"
