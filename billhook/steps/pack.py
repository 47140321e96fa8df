"""Pack a model directory, and unpack it: each tensor with enough zeros becomes a bitmask and its non-zero values.

A tensor is packed if that needs fewer bytes, for any kind of model and any source of the zeros. The files are read
twice, to count and to write, a few million weights at a time. Weights that are -0.0, which a multiplication by a mask
makes, count as zeros; their signs are stored with the bitmask where that is smaller than storing them as values.

The effect of int8 rounding on quality is not measured here: evaluate the result.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from billhook.ambient import pinned
from billhook.architectures.layers import is_transposed_on_disk
from billhook.architectures.sources import resolve
from billhook.errors import BillhookError
from billhook.packed.expand import dense_bytes, unpack_files
from billhook.packed.format import open_packed
from billhook.packed.select_tensors import packed_size, select_tensors
from billhook.packed.write import PackedFile, relative_error, write_file, write_record
from billhook.reports.publishing import publish, render
from billhook.runtime.layout import MIN_GROUP
from billhook.store import not_a_model
from billhook.store.checkpoint import read_config
from billhook.store.directory import weights_in
from billhook.store.files import copy_files, read_json, sha256, untrusted
from billhook.store.layout import PACKED, RECORD, REPORT, is_packed, is_unfinished
from billhook.store.output import check_output, staging
from billhook.store.shards import INDEX, read_shard, weight_files, weights_index

_PAGES = (".md", ".html")  # they may be rewritten, as report.json, so they have no checksum


@dataclass(frozen=True)
class PackReport:
    """What was packed: bytes of the weight files before and after, and the record's facts about each packed tensor.

    `dense` tensors were left as they were; `error` is the relative error of all packed weights together,
    |W' - W| / |W|, which only int8 makes different from 0.
    """

    output: Path
    dense_bytes: int
    packed_bytes: int
    layers: Mapping[str, Mapping[str, Any]]
    dense: int
    error: float
    notes: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Fraction of the packed tensors' weights that is removed."""
        weights = sum(math.prod(facts["shape"]) for facts in self.layers.values())
        return 1 - sum(facts["nnz"] for facts in self.layers.values()) / weights

    def to_json(self) -> dict[str, Any]:
        """The content of `pack --json`."""
        fields = ("dense_bytes", "packed_bytes", "sparsity", "dense", "error", "notes")
        layers = {
            name: {"sparsity": 1 - facts["nnz"] / math.prod(facts["shape"]), "error": facts["error"]}
            for name, facts in self.layers.items()
        }
        return {"output": str(self.output), **{key: getattr(self, key) for key in fields}, "layers": layers}


@pinned
def pack(
    model: str | Path,
    output: str | Path,
    *,
    values: Literal["stored", "int8"] = "stored",
    group: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda tensor: None,
) -> PackReport:
    """Pack a model directory (or hub name) into `output`; `progress` is called twice for each tensor.

    `values` "int8" rounds the non-zero values, with one scale per row or per `group` of columns (a power of two, at
    least 64). Raises BillhookError for a model without zeros and for a quantized or packed one, and JobError when
    writing fails; nothing is left behind then.
    """
    _check_values(values, group)
    source = resolve(model)
    config = _check_source(source)
    _report(source)
    shards = [read_shard(file) for file in weight_files(source)]
    matrices = select_tensors(shards, _transposed(source, config), values == "int8", group, progress)
    needed = sum(packed_size(shard, matrices) for shard in shards)
    output = check_output(Path(output), source, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        written = [write_file(shard, matrices, folder, progress) for shard in shards]
        found, is_weights = (path.relative_to(source) for path in source.rglob("*")), weights_in(source)
        weights = {path.as_posix() for path in found if is_weights(path)}
        others = copy_files(source, folder, lambda path: path.as_posix() not in (*weights, INDEX))
        checked = [path for path in others if path.suffix not in _PAGES and path.as_posix() != REPORT]
        # one with another name is among the others
        index = (source / INDEX).read_bytes().decode() if weights_index(source) == source / INDEX else None
        files = {path.as_posix(): sha256(folder / path) for path in checked}
        record = write_record(folder, written, matrices, index, files)
        # evaluations before rounding are not valid for the rounded model
        _report(folder, publish, {"evaluations": []} if values == "int8" else None)
    return _summary(output, written, record, sorted(weights - {shard.path.name for shard in shards}))


@pinned
def unpack(
    directory: str | Path,
    output: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda file: None,
) -> Path:
    """Write the dense model of a packed `directory` and return its path; `progress` is called for each finished file.

    The files are the same as before packing, byte for byte; int8 values are multiplied by their scales and rounded to
    the model's dtype. Raises BillhookError, and leaves nothing behind, for a directory that was changed after packing.
    """
    directory = Path(directory).expanduser()
    if not is_packed(directory):
        raise BillhookError(
            f"{directory} is not a packed model: it has no {PACKED}. Give a directory that billhook pack wrote."
        )
    packed = open_packed(directory)
    packed.check()
    _report(directory)
    needed = dense_bytes(packed)
    output = check_output(Path(output), directory, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        unpack_files(packed, folder, progress)
        packed_files = {PACKED, *(shard.file.path.name for shard in packed.shards)}
        copy_files(directory, folder, lambda path: path.as_posix() not in packed_files)
        _report(folder, publish)
    return output


def _report(folder: Path, make: Callable[..., Any] = render, changes: Mapping[str, Any] | None = None) -> None:
    """Make (by default, only check) the report of a directory that has one."""
    if (folder / RECORD).is_file() and (folder / REPORT).is_file():
        make(folder, changes)


def _summary(
    output: Path, written: Sequence[PackedFile], record: Mapping[str, Any], others: Sequence[str]
) -> PackReport:
    error = relative_error([squares for file in written for squares in file.squares.values()])
    dense = sum(file.shard.path.stat().st_size for file in written)
    tensors = sum(len(file.shard.entries) for file in written) - len(record["layers"])
    notes = [f"{name} holds weights outside the checkpoint and was left out." for name in others]
    return PackReport(
        output, dense_bytes=dense, packed_bytes=sum(file.bytes for file in written), layers=record["layers"],
        dense=tensors, error=error, notes=notes,
    )  # fmt: skip


def _check_values(values: str, group: int | None) -> None:
    if values not in ("stored", "int8"):
        raise BillhookError(f"Unknown values {values!r}: use stored or int8.")
    if group is not None and (values != "int8" or group < MIN_GROUP or group & (group - 1)):
        raise BillhookError(
            f"group={group}: a group of int8 values that share a scale is 64, 128, 256, ... columns (with values "
            "int8 only)."
        )


def _check_source(source: Path) -> dict[str, Any]:
    """The configuration of a model that can be packed; raises BillhookError for one that cannot."""
    if is_packed(source):
        raise BillhookError(
            f"{source} is packed already. To pack it differently, unpack it first: billhook unpack {source} -o DENSE."
        )
    if is_unfinished(source):
        raise BillhookError(
            f"{source} is not finished: resume it with the command that started it and --resume, then pack it."
        )
    config = read_config(source)
    if not weight_files(source):
        raise BillhookError(not_a_model.directory(source))
    return config


def _transposed(source: Path, config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether the tensor of a name is stored [in, out], from billhook.json or the model type."""
    record = read_json(source / RECORD, "record of a pruned model") if (source / RECORD).is_file() else {"layers": {}}
    with untrusted(f"{source / RECORD} is damaged", "Restore it, or move it away."):
        layers = record["layers"]
        pieces = [piece for layer in layers.values() for piece in layer.get("pieces", [layer])]
        known = {piece.get("tensor"): piece.get("transposed") is True for piece in pieces}
    return lambda name: known.get(name, is_transposed_on_disk(str(config.get("model_type")), name))
