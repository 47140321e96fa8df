"""Write the packed form of weight files, in parts of bounded size, and the record that describes them.

With int8, each kept value w becomes round(w / s), where s is the largest |w| of its row (or group of columns) over 127.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

import billhook
from billhook.errors import BillhookError
from billhook.packed.format import BLOCK_WEIGHTS, ITEM_BYTES, VERSION, Matrix, digest
from billhook.packed.select_tensors import stored_integers
from billhook.runtime import native
from billhook.runtime.fallback import pack_bits, unpack_bits
from billhook.runtime.layout import PADDING
from billhook.store.files import encoded, write_json
from billhook.store.layout import PACKED
from billhook.store.shards import Entry, Shard
from billhook.store.tensor_bytes import DTYPES, tensor_bytes


class TensorFile:
    """A safetensors file whose tensors are written in parts, in any order.

    Bitmasks come first, then the other tensors by decreasing item size, so that every bitmask is aligned to 8 bytes and
    every other tensor to its item size. `crc32` has the checksums of the tensors.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]], masks: set[str]) -> None:
        """`tensors` maps names to dtype, shape and bytes."""
        items = {name: size // max(1, math.prod(shape)) for name, (_, shape, size) in tensors.items()}
        order = sorted(tensors, key=lambda name: (name not in masks, -items[name]))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position, self.position = 0, {}
        for name in order:
            dtype, shape, size = tensors[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            self.position[name] = position
            position += size
        text = encoded(json.dumps(header, separators=(",", ":"), ensure_ascii=False))
        text += b" " * (-(8 + len(text)) % 64)
        self.start = 8 + len(text)
        self.bytes = self.start + position
        self.crc32 = dict.fromkeys(order, 0)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self.bytes)

    def add(self, name: str, data: Tensor | np.ndarray) -> None:
        """Write the next bytes of a tensor."""
        raw = tensor_bytes(data) if isinstance(data, Tensor) else data.reshape(-1).view(np.uint8).data
        self._file.seek(self.start + self.position[name])
        self._file.write(raw)
        self.position[name] += len(raw)
        self.crc32[name] = zlib.crc32(raw, self.crc32[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@dataclass
class PackedFile:
    """A packed file: its name and size, the SHA-256 of the dense file it replaces, and checksums of its tensors.

    `squares` has for each packed tensor the sums of squared int8 errors and of squared weights.
    """

    file: str
    shard: Shard
    bytes: int
    sha256: str
    crc32: dict[str, int]
    squares: dict[str, tuple[float, float]]


def write_file(
    shard: Shard, matrices: Mapping[str, Matrix], folder: Path, progress: Callable[[str], None]
) -> PackedFile:
    """Write the packed form of `shard` into `folder`; `progress` is called with the name of each tensor."""
    sha256, squares = hashlib.sha256(shard.header), {}
    target = folder / f"{shard.path.name.removesuffix('.safetensors')}.packed.safetensors"
    tensors, masks = _tensors(shard, matrices)
    with TensorFile(target, tensors, masks) as file:
        for entry in shard.entries.values():
            matrix = matrices.get(entry.name)
            if matrix is not None:
                squares[entry.name] = _add_matrix(file, shard, entry, matrix, sha256)
            else:
                raw = np.memmap(shard.path, np.uint8, "r")[entry.start : entry.stop]
                file.add(entry.name, raw)
                sha256.update(raw.data)
            progress(entry.name)
    return PackedFile(target.name, shard, file.bytes, sha256.hexdigest(), file.crc32, squares)


def _tensors(
    shard: Shard, matrices: Mapping[str, Matrix]
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], set[str]]:
    tensors, masks = {}, set()
    for entry in shard.entries.values():
        if entry.name not in matrices:
            tensors[entry.name] = (entry.dtype, entry.shape, entry.stop - entry.start)
            continue
        for name, (dtype, shape) in matrices[entry.name].parts.items():
            tensors[name] = (dtype, shape, math.prod(shape) * ITEM_BYTES[dtype])
            masks |= {name} if dtype == "U8" else set()
    return tensors, masks


def _add_matrix(
    file: TensorFile, shard: Shard, entry: Entry, matrix: Matrix, sha256: "hashlib._Hash"
) -> tuple[float, float]:
    """Write a packed tensor, and update `sha256` with the bytes that unpacking will give.

    Returns the sums of squared errors and of squared weights.
    """
    dense = stored_integers(shard, entry)
    dense = dense.T if matrix.transposed else dense.reshape(matrix.rows, matrix.columns)
    step = matrix.rows if matrix.transposed else max(1, BLOCK_WEIGHTS // matrix.columns)
    errors = weights = 0.0
    for first in range(0, matrix.rows, step):
        integers = torch.from_numpy(np.array(dense[first : first + step], order="C").view(f"<i{dense.itemsize}"))
        parts, back = _pack(integers, matrix)
        for part, data in parts.items():
            file.add(f"{entry.name}.{part}", data)
        if matrix.int8:
            before = integers.view(DTYPES[matrix.dtype]).double()
            errors += float((back - before).square().sum())
            weights += float(before.square().sum())
            back = back.to(DTYPES[matrix.dtype])
        sha256.update(tensor_bytes(back.T.contiguous() if matrix.transposed else back))
    file.add(f"{entry.name}.values", np.zeros(PADDING, np.uint8))
    return errors, weights


def _pack(integers: Tensor, matrix: Matrix) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of some rows, given as integers, and what they expand to: the rows themselves, for int8 in float32."""
    weight = integers.view(DTYPES[matrix.dtype])
    parts: dict[str, Tensor] = {}
    if matrix.negative_zeros:
        negative = integers == torch.iinfo(integers.dtype).min
        parts["signs"] = pack_bits(negative)
        integers = integers.masked_fill(negative, 0)
    bitmask, values = native.pack(integers.view(weight.dtype))
    values = values[: len(values) - PADDING // values.element_size()]
    parts |= {"bitmask": bitmask, "values": values}
    if not matrix.int8:
        return parts, weight
    scales, rounded = _round_to_int8(weight, matrix)
    keep = unpack_bits(bitmask, matrix.columns)
    parts |= {"values": rounded[keep], "scales": scales}
    back = torch.where(keep, rounded, 0).float() * native.spread_scales(scales, matrix.columns)
    return parts, torch.where(negative, -0.0, back) if matrix.negative_zeros else back


def _round_to_int8(weight: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Scales, float32 [rows] or [rows, groups], and the rounded weights, int8 [rows, columns]."""
    values = weight.float()
    if not torch.isfinite(values).all():
        raise BillhookError(f"{matrix.name} holds NaN or infinity, which int8 cannot hold: repair the model.")
    group = matrix.group or matrix.columns
    padded = torch.nn.functional.pad(values.abs(), (0, -matrix.columns % group))
    largest = padded.view(len(values), -1, group).amax(-1)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    scales = scales.squeeze(1) if matrix.group is None else scales
    return scales, (values / native.spread_scales(scales, matrix.columns)).round().clamp(-127, 127).to(torch.int8)


def relative_error(squares: Sequence[tuple[float, float]]) -> float:
    """|W' - W| / |W| from sums of squared errors and squared weights; 0 if all weights are 0."""
    errors, weights = (sum(column) for column in zip(*squares, strict=True))
    return math.sqrt(errors / weights) if weights else 0.0


def write_record(
    folder: Path,
    written: Sequence[PackedFile],
    matrices: Mapping[str, Matrix],
    index: str | None,
    files: Mapping[str, str],
) -> dict[str, Any]:
    """Write billhook_packed.json for the packed files in `folder` and return its content.

    `index` is the text of the dense files' index; `files` maps the other files to their SHA-256.
    """
    errors = {name: relative_error([squares]) for file in written for name, squares in file.squares.items()}
    shards = {}
    for file in written:
        facts = {"file": file.file, "bytes": file.bytes, "sha256": file.sha256}
        shards[file.shard.path.name] = facts | {"header": file.shard.header[8:].decode()}
    record = {
        "version": VERSION,
        "billhook": billhook.__version__,
        "group": next(iter(matrices.values())).group,
        "shards": shards,
        "index": index,
        "layers": {name: _layer(matrix, errors[name]) for name, matrix in matrices.items()},
        "tensors": {name: value for file in written for name, value in file.crc32.items()},
        "files": dict(files),
    }
    record["digest"] = digest(record)
    write_json(folder / PACKED, record)
    return record


def _layer(matrix: Matrix, error: float) -> dict[str, Any]:
    values = "I8" if matrix.int8 else matrix.dtype
    form = {"dtype": matrix.dtype, "shape": list(matrix.shape), "values": values, "transposed": matrix.transposed}
    return form | {"nnz": matrix.nnz, "negative_zeros": matrix.negative_zeros, "error": error}
