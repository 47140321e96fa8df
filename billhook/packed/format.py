"""The packed format (docs/formats/packed.md): open a packed directory and check it. No torch.

In place of a sparse tensor NAME the safetensors files hold NAME.bitmask, NAME.values and, where needed, NAME.scales and
NAME.signs; `billhook_packed.json` describes them, with a checksum of every tensor and file. The files are not trusted:
shapes, sizes and offsets are compared before they are used, so that a damaged or hostile file causes a BillhookError
and never an out-of-bounds read.
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
FLOATS = ("BF16", "F16", "F32")  # dtypes of tensors that can be packed
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1}
PARTS = ("bitmask", "values", "scales", "signs")
BLOCK_WEIGHTS = 1 << 22  # weights that are counted, packed or expanded at a time, to bound memory
_ADVICE = "Copy the directory again, or pack the model again."


@dataclass(frozen=True)
class Matrix:
    """A packed tensor as a matrix [rows, columns]: [out, in] for a layer, [out, channels · kernel] for a convolution of
    two or three dimensions, and all experts stacked for a 3-D tensor.

    `shape` is that of the dense tensor on disk, [in, out] if `transposed`. `nnz` values are kept, `negative_zeros` of
    the others are -0.0. `group` columns share an int8 scale, None for whole rows.
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
        if len(self.shape) > 3:
            return self.shape[0]
        return self.shape[-1] if self.transposed else math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        if len(self.shape) > 3:
            return math.prod(self.shape[1:])
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of each tensor in the file that makes up this one, by name."""
        mask = ("U8", (self.rows, mask_bytes(self.columns)))
        kind = "I8" if self.int8 else self.dtype
        found = {"bitmask": mask, "values": (kind, (self.nnz + PADDING // ITEM_BYTES[kind],))}
        if self.int8:
            groups = () if self.group is None else (-(-self.columns // self.group),)
            found["scales"] = ("F32", (self.rows, *groups))
        if self.negative_zeros:
            found["signs"] = mask
        return {f"{self.name}.{part}": facts for part, facts in found.items()}

    @property
    def packed_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in self.parts.values())


@dataclass(frozen=True)
class PackedShard:
    """A packed file, with name, header (including its length), tensors and SHA-256 of the dense file it replaces."""

    name: str
    file: Shard
    header: bytes
    entries: Mapping[str, Entry]
    sha256: str

    @cached_property
    def bytes(self) -> np.ndarray:
        """The packed file, uint8 [n], memory-mapped; writing changes the memory of this process only."""
        return np.memmap(self.file.path, np.uint8, "c")

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor of the packed file, uint8 [n], memory-mapped."""
        entry = self.file.entries[name]
        return self.bytes[entry.start : entry.stop]


@dataclass(frozen=True)
class Packed:
    """A packed directory: its record (billhook_packed.json), packed tensors, and files in the order of dense files."""

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

    def problems(self, checked: Callable[[str], bool] = lambda name: True) -> Iterator[str]:
        """The differences of tensors, and of other files whose name is `checked`, from the record; reads all bytes."""
        for name, digest in self.record["files"].items():
            if checked(name) and not (self.path / name).is_file():
                yield f"{name} is missing."
            elif checked(name) and sha256(self.path / name) != digest:
                yield f"{name} is not the file that was packed: its SHA-256 differs."
        places = [(name, shard) for shard in self.shards for name in shard.file.entries]
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda place: zlib.crc32(place[1].raw(place[0])), places)
            for (name, shard), found in zip(places, sums, strict=True):
                if found != self.record["tensors"][name]:
                    problem = f"the bytes of {name} are not those that were written, its checksum differs"
                    yield f"{shard.file.path}: {problem}. {_ADVICE}"

    def check(self, checked: Callable[[str], bool] = lambda name: True) -> None:
        """Raise BillhookError for the first of `problems`."""
        for problem in self.problems(checked):
            raise BillhookError(f"{self.path}: {problem}")


def digest(record: Mapping[str, Any]) -> str:
    """The SHA-256 that a record holds of itself: of its json without `digest`, with sorted keys and no spaces."""
    rest = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_packed(directory: Path) -> Packed:
    """Open a packed directory and check everything except the bytes of its tensors and of the other files.

    Raises BillhookError for a record that was changed or has another version, and for missing or changed files.
    """
    path = directory / PACKED
    record = read_json(path, "record of a packed model")
    if record.get("version") != VERSION:
        found = f"has version {record.get('version')!r}; this Billhook reads version {VERSION}"
        raise BillhookError(f"{path} {found}. Pack the model again.")
    if record.get("digest") != digest(record):
        raise BillhookError(f"{path} was changed after it was written: its own checksum differs. {_ADVICE}")
    try:
        matrices = {name: _matrix(name, facts, record["group"]) for name, facts in record["layers"].items()}
        shards = tuple(_shard(directory, name, facts) for name, facts in record["shards"].items())
        _check_record(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, BillhookError):
            raise
        found = f"{type(error).__name__}: {error}"
        raise BillhookError(f"{path} is not a record of a packed model ({found}). {_ADVICE}") from None
    packed = Packed(directory, record, matrices, shards)
    _check_tensors(packed)
    return packed


def _matrix(name: str, facts: Mapping[str, Any], group: int | None) -> Matrix:
    shape = tuple(_whole(size, 1) for size in facts["shape"])
    dtype, int8, transposed = facts["dtype"], facts["values"] == "I8", facts["transposed"]
    if len(shape) < 2 or dtype not in FLOATS or facts["values"] not in (dtype, "I8"):
        raise ValueError(f"{name} is a {dtype} tensor {list(shape)} with values {facts['values']}")
    power_of_two = group is None or not _whole(group, MIN_GROUP) & (group - 1)
    if type(transposed) is not bool or (transposed and len(shape) != 2) or not power_of_two:
        raise ValueError(f"{name}: transposed {transposed!r}, group {group!r}")
    nnz, negative_zeros = (_whole(facts[key], 0, math.prod(shape)) for key in ("nnz", "negative_zeros"))
    return Matrix(name, dtype, shape, transposed, nnz=nnz, negative_zeros=negative_zeros, int8=int8, group=group)


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
    path = directory / file
    if path.is_file() and path.stat().st_size != facts["bytes"]:
        raise BillhookError(f"{path} is not {facts['bytes']} bytes long, as it was when it was packed. {_ADVICE}")
    header = len(text).to_bytes(8, "little") + text
    return PackedShard(name, read_shard(path), header, parse_header(directory / PACKED, header), facts["sha256"])


def _check_record(record: Mapping[str, Any]) -> None:
    for name, value in record["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not isinstance(value, str):
            raise ValueError(f"the file {name!r}")
    if not isinstance(record["index"], str | None) or not isinstance(record["tensors"], dict) or not record["layers"]:
        raise ValueError("index, tensors or layers")


def _check_tensors(packed: Packed) -> None:
    """Compare the tensors of the packed files with the expected ones by name, dtype, shape and alignment."""
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
                where = f"the {entry.dtype} tensor {list(entry.shape)} of the dense file"
                raise BillhookError(f"{packed.path / PACKED}: {name} is not {where}.")
        found = {name: (entry.dtype, entry.shape) for name, entry in shard.file.entries.items()}
        if found != expected:
            name = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            difference = f"{_words(found.get(name))}, expected {_words(expected.get(name))}"
            raise BillhookError(f"{shard.file.path}: {name} is {difference}. {_ADVICE}")
        for name, entry in shard.file.entries.items():
            item = (entry.stop - entry.start) // max(1, math.prod(entry.shape))
            is_mask = name not in shard.entries and entry.dtype == "U8"
            if entry.start % (8 if is_mask else max(1, item)):
                raise BillhookError(f"{shard.file.path}: {name} is not aligned to its item size. {_ADVICE}")
            if type(packed.record["tensors"].get(name)) is not int:
                raise BillhookError(f"{packed.path / PACKED} has no checksum of {name}. {_ADVICE}")
    if left:
        raise BillhookError(f"{packed.path / PACKED}: {next(iter(left))} is in no file. {_ADVICE}")


def _words(facts: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if facts is None else f"{facts[0]} {list(facts[1])}"
