"""Pack a model directory: each tensor with enough zeros becomes a bitmask and its other values, all else stays as it
is.

A tensor is packed where that takes fewer bytes, whoever made the zeros and whatever the model is. The files are read
twice, to count and to write, a few million weights at a time. Weights that are -0.0, as multiplying with a mask leaves
them, go with the other zeros; their signs are kept beside the bitmask where that is smaller than keeping them as
values.

With int8, each kept value w becomes round(w / s), s being the largest |w| of its row (or group of columns) over 127. It
is not known here what that does to the model's answers: score the result.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import billhook
from billhook.errors import BillhookError
from billhook.packed.format import VERSION, Matrix, digest
from billhook.packed.select_tensors import choose, packed_size
from billhook.packed.write_file import Written, write_packed
from billhook.reports.publishing import publish
from billhook.runtime.layout import MIN_GROUP
from billhook.store.checkpoint import resolve
from billhook.store.directory import WEIGHTS
from billhook.store.files import copy_files, read_json, sha256, write_json
from billhook.store.layout import PACKED, RECORD, REPORT, is_packed, is_unfinished
from billhook.store.output import check_output, staging
from billhook.store.shards import INDEX, read_shard, weight_files

_CONV1D = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
}  # layers stored [in, out], by model_type
_PAGES = (".md", ".html")  # they may be written anew, as report.json may


@dataclass(frozen=True)
class PackReport:
    """What was packed: bytes of the weight files before and after, and for each packed tensor what the record says of
    it.

    `dense` tensors stayed as they were; `error` is the relative error of all packed weights together, |W' - W| / |W|, 0
    but for int8.
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
        return 1 - sum(facts["nnz"] for facts in self.layers.values()) / sum(
            math.prod(facts["shape"]) for facts in self.layers.values()
        )

    def to_json(self) -> dict[str, Any]:
        """The same, for machines."""
        sizes = {"dense_bytes": self.dense_bytes, "packed_bytes": self.packed_bytes, "sparsity": self.sparsity}
        layers = {
            name: {"sparsity": 1 - facts["nnz"] / math.prod(facts["shape"]), "error": facts["error"]}
            for name, facts in self.layers.items()
        }
        return {
            "output": str(self.output),
            **sizes,
            "dense": self.dense,
            "error": self.error,
            "notes": self.notes,
            "layers": layers,
        }


def pack(
    model: str | Path,
    output: str | Path,
    *,
    values: Literal["stored", "int8"] = "stored",
    group: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda tensor: None,
) -> PackReport:
    """Pack a model directory (or hub name) into `output`; `progress` is told each tensor of the weight files, twice.

    `values` "int8" rounds the kept values, with one scale a row or (`group` a power of two, 64 at least) a run of
    columns. Raises BillhookError for a model without zeros, a quantized or packed one, and JobError when writing fails;
    nothing is left then.
    """
    _check_values(values, group)
    source = resolve(model)
    config = _check_source(source)
    shards = [read_shard(file) for file in weight_files(source)]
    matrices = choose(shards, _transposed(source, config), values == "int8", group, progress)
    needed = sum(packed_size(shard, matrices) for shard in shards)
    output = check_output(Path(output), source, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        written = [write_packed(shard, matrices, folder, progress) for shard in shards]
        left_out = _weight_files(source)
        others = copy_files(source, folder, lambda path: path.as_posix() not in (*left_out, INDEX))
        record = _record(source, written, matrices, group)
        checked = [path for path in others if path.suffix not in _PAGES and path.as_posix() != REPORT]
        record["files"] = {path.as_posix(): sha256(folder / path) for path in checked}
        write_json(folder / PACKED, {**record, "digest": digest(record)})
        if (folder / RECORD).is_file() and (folder / REPORT).is_file():
            publish(folder, {"evaluations": []} if values == "int8" else None)  # of which those before do not speak
    return _report(output, written, record, sorted(left_out - {shard.path.name for shard in shards}))


def _weight_files(source: Path) -> set[str]:
    """All files that hold weights, by path, those outside the checkpoint too."""
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix in WEIGHTS}


def _record(
    source: Path, written: Sequence[Written], matrices: Mapping[str, Matrix], group: int | None
) -> dict[str, Any]:
    """The content of billhook_packed.json but for its own digest and the files beside the weights."""
    errors = {name: _relative([squares]) for file in written for name, squares in file.squares.items()}
    return {
        "version": VERSION,
        "billhook": billhook.__version__,
        "group": group,
        "shards": {
            file.shard.path.name: {
                "file": file.file,
                "bytes": file.bytes,
                "sha256": file.sha256,
                "header": file.shard.header[8:].decode(),
            }
            for file in written
        },
        "index": (source / INDEX).read_bytes().decode() if (source / INDEX).is_file() else None,
        "layers": {name: _layer(matrix, errors[name]) for name, matrix in matrices.items()},
        "tensors": {name: value for file in written for name, value in file.crc32.items()},
    }


def _layer(matrix: Matrix, error: float) -> dict[str, Any]:
    return {
        "dtype": matrix.dtype,
        "shape": list(matrix.shape),
        "values": "I8" if matrix.int8 else matrix.dtype,
        "transposed": matrix.transposed,
        "nnz": matrix.nnz,
        "negative_zeros": matrix.negative_zeros,
        "error": error,
    }


def _relative(squares: Sequence[tuple[float, float]]) -> float:
    """|W' - W| / |W|, given the squares of both norms, piece by piece; 0 where there are no weights."""
    errors, weights = (sum(column) for column in zip(*squares, strict=True))
    return math.sqrt(errors / weights) if weights else 0.0


def _report(output: Path, written: Sequence[Written], record: Mapping[str, Any], others: Sequence[str]) -> PackReport:
    error = _relative([squares for file in written for squares in file.squares.values()])
    dense = sum(file.shard.path.stat().st_size for file in written)
    tensors = sum(len(file.shard.entries) for file in written) - len(record["layers"])
    notes = [f"{name} holds weights outside the checkpoint and was left out." for name in others]
    return PackReport(output, dense, sum(file.bytes for file in written), record["layers"], tensors, error, notes)


def _check_values(values: str, group: int | None) -> None:
    if values not in ("stored", "int8"):
        raise BillhookError(f"Unknown values {values!r}: use stored or int8.")
    if group is not None and (values != "int8" or group < MIN_GROUP or group & (group - 1)):
        raise BillhookError(
            f"group={group}: a group of int8 values that share a scale is 64, 128, 256, ... columns (with values "
            "int8 only)."
        )


def _check_source(source: Path) -> dict[str, Any]:
    if is_packed(source):
        raise BillhookError(
            f"{source} is packed already. To pack it differently, unpack it first: billhook unpack {source} -o DENSE."
        )
    if is_unfinished(source):
        raise BillhookError(
            f"{source} is not finished: continue it with the command that began it and --resume, then pack it."
        )
    if not (source / "config.json").is_file():
        raise BillhookError(f"{source} has no config.json: give the directory of a Hugging Face model.")
    config = read_json(source / "config.json", "model configuration")
    if "quantization_config" in config or "compression_config" in config:
        raise BillhookError(
            f"{source} is a quantized checkpoint: pack the unquantized model; --values int8 makes it smaller still."
        )
    if not weight_files(source):
        raise BillhookError(f"{source} has no model.safetensors and no {INDEX}: only safetensors can be packed.")
    return config


def _transposed(source: Path, config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Tells of a tensor by its name whether it is stored [in, out]: by billhook.json, else by what is known of the
    model type."""
    known = {}
    if (source / RECORD).is_file():
        layers = read_json(source / RECORD, "record of a pruned model").get("layers")
        pieces = (
            [p for facts in (layers or {}).values() for p in facts.get("pieces", [facts])]
            if isinstance(layers, dict)
            else []
        )
        known = {piece.get("tensor"): piece.get("transposed") is True for piece in pieces}
    kinds = _CONV1D.get(str(config.get("model_type")), ())
    return lambda name: known.get(name, name.removesuffix(".weight").rpartition(".")[2] in kinds)
