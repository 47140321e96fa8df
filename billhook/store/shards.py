"""Safetensors files at byte level: read the header, count zeros, and rewrite values in the same layout.

A safetensors file is 8 bytes of header length, a json header (name -> dtype, shape, byte range) and the values. New
values behind the same header keep the names, order, dtypes and metadata of the input, and can be written in any order,
one tensor in memory at a time. This module does not import torch.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from billhook.errors import BillhookError
from billhook.store.files import read_json, write_json
from billhook.store.typed_json import typed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPLICIT = "transformers_weights"  # in config.json: the name of a file or of an index
_MAX_HEADER = 100_000_000
_CHUNK = 1 << 24
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "BOOL": 8, "C64": 64}
_BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_EXPONENTS = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}  # all set: NaN or infinity
_FLOATS = tuple(_EXPONENTS)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `stop` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: the bytes of its header, with the length, and its tensors in the order of their bytes."""

    path: Path
    header: bytes
    entries: dict[str, Entry]

    def zeros(self, entry: Entry, index: int | None = None) -> np.ndarray:
        """Whether each value of a tensor, or of entry `index` of its first dimension, is 0.0 or -0.0: bool, same shape.

        Raises BillhookError for a tensor that is not of a floating-point dtype.
        """
        if entry.dtype not in _FLOATS:
            fault = f"is {entry.dtype}, not a floating-point dtype: its zeros cannot be counted."
            raise BillhookError(f"{self.path}: {entry.name} {fault}")
        bits = _BITS[entry.dtype]
        kind = np.dtype(f"<u{bits // 8}")
        shape = entry.shape if index is None else entry.shape[1:]
        start = entry.start + (index or 0) * math.prod(shape) * kind.itemsize
        values = np.fromfile(self.path, dtype=kind, count=math.prod(shape), offset=start)
        magnitude = kind.type((1 << (bits - 1)) - 1)  # every bit but the sign
        found: np.ndarray = (values & magnitude == 0).reshape(shape)
        return found

    def finite(self, entry: Entry) -> bool:
        """Whether a tensor holds neither NaN nor infinity; True for one that is not of floating-point numbers."""
        if entry.dtype not in _FLOATS:
            return True
        exponent = _EXPONENTS[entry.dtype]
        return not any(bool((part & part.dtype.type(exponent) == exponent).any()) for part in self._parts(entry))

    def same_where_nonzero(self, entry: Entry, other: "Shard", original: Entry) -> bool:
        """Whether the values of a tensor that are not zero have the bytes of `original`, a tensor of another file."""
        if (entry.dtype, entry.shape) != (original.dtype, original.shape):
            return False
        magnitude = (1 << (_BITS[entry.dtype] - 1)) - 1 if entry.dtype in _FLOATS else 255
        pairs = zip(self._parts(entry), other._parts(original), strict=True)
        return not any(bool(((a != b) & (a & a.dtype.type(magnitude) != 0)).any()) for a, b in pairs)

    def _parts(self, entry: Entry) -> Iterator[np.ndarray]:
        """The values of a tensor, some at a time, as unsigned integers; bytes where it is not of floating point."""
        kind = np.dtype(f"<u{_BITS[entry.dtype] // 8}" if entry.dtype in _FLOATS else np.uint8)
        for start in range(entry.start, entry.stop, _CHUNK):
            count = (min(entry.stop, start + _CHUNK) - start) // kind.itemsize
            yield np.fromfile(self.path, dtype=kind, count=count, offset=start)


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file; raises BillhookError when the file is missing or damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(_MAX_HEADER, size - 8):
                raise BillhookError(f"{path} is not a safetensors file, or it is cut off: copy or download it again.")
            header = file.read(length)
    except OSError as error:
        raise BillhookError(f"Cannot read the weights {path}: {error.strerror or error}.") from None
    entries = parse_header(path, start + header)
    if (stop := max((entry.stop for entry in entries.values()), default=8 + length)) != size:
        raise BillhookError(f"{path} holds {size} bytes where its header promises {stop}: copy or download it again.")
    return Shard(path, start + header, entries)


def parse_header(path: Path, header: bytes) -> dict[str, Entry]:
    """The tensors in a safetensors header (with its 8 bytes of length), in the order of their bytes.

    Raises BillhookError for a header that is damaged or leaves gaps, naming `path`.
    """
    try:
        listed = json.loads(header[8:])
        listed.pop("__metadata__", None)
        entries = [_entry(name, item, len(header)) for name, item in listed.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        raise BillhookError(f"{path} has a damaged safetensors header: copy or download it again.") from None
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = len(header)
    for entry in entries:
        if entry.start != position:
            raise BillhookError(f"{path} has a damaged safetensors header at {entry.name}: copy or download it again.")
        position = entry.stop
    return {entry.name: entry for entry in entries}


def _entry(name: str, item: dict[str, object], offset: int) -> Entry:
    start, stop = (int(x) for x in item["data_offsets"])  # type: ignore[attr-defined]
    shape = tuple(int(x) for x in item["shape"])  # type: ignore[attr-defined]
    entry = Entry(name, str(item["dtype"]), shape, offset + start, offset + stop)
    if (stop - start) * 8 != math.prod(shape) * _BITS[entry.dtype] or min(shape, default=0) < 0:
        raise ValueError(name)
    return entry


def weights_entry(directory: Path) -> Path | None:
    """The safetensors file, or the index of several, that `transformers` reads of a model directory; None without one.

    In its order: what `transformers_weights` in config.json names, the single file, the index. Raises BillhookError for
    a damaged config.json, and where it names what is not there or no safetensors.
    """
    config = directory / "config.json"
    named = read_json(config, "model configuration", own=False).get(EXPLICIT) if config.is_file() else None
    if named is None:
        return next((directory / name for name in (SINGLE, INDEX) if (directory / name).is_file()), None)
    name: str = typed(str, named, f"{config}, {EXPLICIT}")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise BillhookError(f"{config}, {EXPLICIT}: {name!r} is neither a safetensors file nor an index of such files.")
    return _inside(directory, name, config)


def weights_index(directory: Path) -> Path | None:
    """The index that `transformers` reads of a model directory, or None where it reads a single file or nothing."""
    entry = weights_entry(directory)
    return entry if entry is not None and entry.suffix == ".json" else None


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that `transformers` reads of a model directory.

    Raises BillhookError for a damaged index, for a file that is missing, and as `weights_entry` does.
    """
    entry = weights_entry(directory)
    if entry is None or entry.suffix != ".json":
        return [] if entry is None else [entry]
    placed = read_json(entry, "safetensors index", own=False).get("weight_map")
    names = sorted(set(typed(dict[str, str], placed, f"{entry}, weight_map").values()))
    return [_inside(directory, name, entry) for name in names]


def _inside(directory: Path, name: str, source: Path) -> Path:
    """The file `name`, which the file `source` names, of a directory."""
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise BillhookError(
            f"{source} names the file {name!r}: only plain file names in the same directory are allowed."
        )
    if (directory / name).is_dir():
        raise BillhookError(f"{directory / name}, which {source.name} names, is a directory: put the file there.")
    if not (directory / name).is_file():
        raise BillhookError(f"{source} names {name}, which is not in {directory}: copy or download the missing file.")
    return directory / name


def without_missing_entry(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entries of a config.json for `folder`: without `transformers_weights` where what it names is not there."""
    lacks = EXPLICIT in config and not (folder / str(config[EXPLICIT])).is_file()
    return {key: value for key, value in config.items() if not (lacks and key == EXPLICIT)}


def lacks_metadata(index: Path) -> bool:
    """Whether an index has no object `metadata`, without which `transformers` cannot open a directory."""
    return not isinstance(read_json(index, "safetensors index", own=False).get("metadata"), dict)


def copy_index(index: Path, folder: Path, size: int) -> None:
    """Copy an index into `folder`, with `metadata` of the `size` of all tensors where it lacks that object."""
    shutil.copyfile(index, folder / index.name)
    if lacks_metadata(index):
        found = read_json(index, "safetensors index", own=False)
        write_json(folder / index.name, {**found, "metadata": {"total_size": size}})


def write_index(directory: Path, files: Sequence[str]) -> None:
    """Write the index of safetensors `files` in a directory."""
    shards = [read_shard(directory / name) for name in files]
    total = sum(entry.stop - entry.start for shard in shards for entry in shard.entries.values())
    where = {name: shard.path.name for shard in shards for name in shard.entries}
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def file_names(count: int) -> list[str]:
    """The names of `count` safetensors files of one model."""
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def weight_bytes(directory: Path) -> int:
    """The size of all safetensors files of a model directory."""
    return sum(file.stat().st_size for file in weight_files(directory))


def result_bytes(directory: Path) -> int:
    """The size of all safetensors and GGUF files in a directory."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".safetensors", ".gguf"))


def layer_zeros(place: Mapping[str, Any], shape: Sequence[int], shards: Iterable[Shard]) -> list[np.ndarray] | None:
    """Whether each weight of a layer at its `place` (`billhook.store.locate`) is zero: bool [rows, in] for each piece.

    None when there is no such tensor, or the pieces together do not have `shape` [out, in].
    """
    found = []
    for piece in place.get("pieces", [place]):
        shard = next((shard for shard in shards if piece.get("tensor") in shard.entries), None)
        if shard is None:
            return None
        entry, index, rows = shard.entries[piece["tensor"]], piece.get("index"), piece.get("rows")
        if len(entry.shape) < 2 or (index is not None and not (len(entry.shape) == 3 and 0 <= index < entry.shape[0])):
            return None
        matrix = shard.zeros(entry, index)
        matrix = matrix.T if piece.get("transposed") else matrix.reshape(len(matrix), -1)  # of a convolution
        found.append(matrix if rows is None else matrix[rows[0] : rows[1]])
    fits = sum(len(matrix) for matrix in found) == shape[0] and all(matrix.shape[1] == shape[1] for matrix in found)
    return found if fits else None


def lay_out(shard: Shard, target: Path, copied: Callable[[str], bool]) -> None:
    """Write `target` with the header of `shard`, the values of tensors for which `copied` is true, and space for the
    others.

    Raises OSError when the disk has no space for the whole file.
    """
    with open(shard.path, "rb") as source, open(target, "wb", buffering=0) as file:
        put(file.fileno(), 0, shard.header)
        size = max((entry.stop for entry in shard.entries.values()), default=len(shard.header))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        os.ftruncate(file.fileno(), size)
        for entry in shard.entries.values():
            if copied(entry.name):
                source.seek(entry.start)
                for position in range(entry.start, entry.stop, _CHUNK):
                    put(file.fileno(), position, source.read(min(_CHUNK, entry.stop - position)))


def put(file: int, position: int, data: bytes | memoryview) -> None:
    """Write all of `data` at `position` of an open file."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, position)
        rest, position = rest[count:], position + count
