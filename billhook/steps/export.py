"""Write a model directory in the format of another program, or decode a quantized one into ordinary weights."""

import functools
import glob
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from billhook.architectures.gguf_names import FAMILIES
from billhook.architectures.sources import is_gguf, resolve
from billhook.errors import BillhookError
from billhook.export.compressed_tensors import fused
from billhook.export.dense import dense_bytes, packed_grids, write_dense
from billhook.export.gguf import TYPES, write_gguf
from billhook.export.gguf_writer import ExportReport
from billhook.methods.quantize.scalar import Scalar
from billhook.plan.bytes import parse_size
from billhook.reports.quantized_card import decoded_card
from billhook.store.checkpoint import check_directory, loading, model_digest
from billhook.store.directory import checksums, copy_others
from billhook.store.files import check_new_file, copy_files, digest_of, sha256, write_json, write_text
from billhook.store.fitting import check_fits, empty_model
from billhook.store.gguf_file import gguf_parts, read_gguf
from billhook.store.layout import CARD, RECORD, is_unfinished
from billhook.store.output import check_output, check_room, staging
from billhook.store.record import Record, Step, append_step, completed, history, read_record
from billhook.store.shards import (
    layer_zeros,
    read_shard,
    result_bytes,
    weight_bytes,
    weight_files,
    without_missing_entry,
)
from billhook.tasks.opening import task_of_config

DTYPES = {"auto": None, "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
_VLLM_BITS = (4, 8)
Progress = Callable[[str], None]


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    kind: str = "auto",
    template: str | Path | None = None,
    split_size: str | int | None = None,
    overwrite: bool = False,
    progress: Progress = lambda tensor: None,
) -> ExportReport:
    """Write a model directory (or hub name) as a GGUF file with weights of the type `kind`, one of `TYPES`; with
    `split_size` (bytes, or such as "4GB"), as several with at most so many bytes of tensors each.

    Quantized weights are decoded first. Where the model has a billhook.json, it is written beside the file, as
    NAME.billhook.json, with this step. Raises BillhookError for a model that has no form in GGUF files and for an
    output that exists, and JobError when writing fails; nothing is left behind then.
    """
    kind = kind.lower()
    if kind not in TYPES:
        raise BillhookError(f"Unknown type {kind!r}: use {', '.join(TYPES)}.")
    output = Path(output).expanduser()
    for file in [output] if split_size is None else [output, *_earlier_parts(output)]:
        _check_new(file, overwrite, *gguf_files(model), template)
    source, config, before = _open(model)
    digest, grids = model_digest(source), packed_grids(source, config)
    facts = {"source.digest": digest} | ({} if before is None else {"steps": ", ".join(x.step for x in before.steps)})
    write = functools.partial(
        write_gguf, output=output, rest=kind, template=None if template is None else Path(template).expanduser(),
        split=None if split_size is None else parse_size(split_size), facts=facts,
    )  # fmt: skip
    if grids:
        check_room(output.absolute(), (4 if kind == "f32" else 2) * dense_bytes(source, grids))
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.absolute().parent) as place:
            folder = Path(place) / source.name
            folder.mkdir()
            write_decoded(source, folder, config, grids, DTYPES.get(kind), progress)
            _check_fits(folder, config)
            written = write(folder)
        written.notes.append("the weights were decoded: quantize the original for a small file of llama.cpp's types")
    else:
        _check_fits(source, config)
        written = write(source, progress=progress)
    if before is not None:
        files = {part.name: sha256(part) for part in written.parts}
        result = next(iter(files.values())) if len(files) == 1 else digest_of(files)
        step = _step({"type": kind, "types": written.types}, source, config, digest, written.notes, result)
        record = append_step(before, step, {}).to_json()
        write_json(output.with_suffix(f".{RECORD}"), {**record, "files": files})
    return written


def export_dense(
    model: str | Path,
    output: str | Path,
    *,
    kind: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda tensor: None,
) -> ExportReport:
    """Write a model directory or a GGUF file, quantized or not, as an ordinary directory in the dtype `kind` of
    `DTYPES`.

    `auto` is the dtype of the scales or of the checkpoint, and float16 where that has matrices of 32 bits, as a decoded
    GGUF file has. Tokenizer, other files and history are kept. Raises BillhookError for a format that is not read, and
    JobError for values that do not fit the dtype and for a full disk; nothing is left behind then.
    """
    kind = kind.lower()
    if kind not in DTYPES:
        raise BillhookError(f"Unknown type {kind!r}: use {', '.join(DTYPES)}.")
    source, config, before = _open(model, Path(output))
    grids, dtype = packed_grids(source, config), DTYPES[kind]
    entries = [entry for file in weight_files(source) for entry in read_shard(file).entries.values()]
    if kind == "auto" and any(entry.dtype in ("F32", "F64") and len(entry.shape) > 1 for entry in entries):
        dtype = torch.float16
    needed = dense_bytes(source, grids) * (2 if kind == "f32" else 1)
    output = check_output(Path(output), source, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        write_decoded(source, folder, config, grids, dtype, progress)
        if before is not None:
            made_by = {"type": kind, "decoded": sorted(Counter(grid.name for grid in grids.values()))}
            digest = None if is_gguf(model) else model_digest(source)  # the record's is that of the file
            step = _step(made_by, source, config, digest, [], None)
            layers = _dense_layers(before, folder)
            record = append_step(before, step, layers).to_json()
            write_json(folder / RECORD, completed(record, layers, checksums(folder)))
            if before.steps[-1].step == "quantize":
                write_text(folder / CARD, decoded_card(folder))
    shards = [read_shard(file) for file in weight_files(output)]
    types = Counter(entry.dtype.lower() for shard in shards for entry in shard.entries.values())
    return ExportReport(output, result_bytes(output), dict(types), [])


def export_vllm(
    model: str | Path, output: str | Path, *, overwrite: bool = False, progress: Progress = lambda tensor: None
) -> ExportReport:
    """Write a quantized directory for vLLM: the same files, once all types are among those that vLLM lists.

    Raises BillhookError for a model that is not quantized, is a GGUF file, has other types than int4 and int8, or
    different types in layers that vLLM fuses.
    """
    if is_gguf(model):
        raise BillhookError(
            f"{model} is a GGUF file, whose types have no form in compressed-tensors: quantize the original with "
            "billhook quantize --type int4 (or int8), or decode this file with billhook export --to dense."
        )
    source, config, before = _open(model)
    grids = packed_grids(source, config)
    if not grids:
        raise BillhookError(
            f"{source} is not quantized: vLLM reads it as it is. Make it smaller with billhook quantize --type int4 or "
            "billhook compress --for vllm."
        )
    names = {name for file in weight_files(source) for name in read_shard(file).entries}
    modules = sorted({name.removesuffix("_packed").removesuffix(".weight") for name in names})
    _check_vllm({name.removesuffix(".weight"): grid for name, grid in grids.items()}, modules)
    needed = weight_bytes(source)
    output = check_output(Path(output), source, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        copy_files(source, folder, lambda path: path.name != RECORD)
        if before is not None:
            step = _step({"type": "vllm"}, source, config, model_digest(source), [], None)
            record = append_step(before, step, {}).to_json()
            write_json(folder / RECORD, completed(record, before.layers, checksums(folder)))
    types = Counter(grid.name for grid in grids.values())
    note = "vLLM was not run: its lists of types and of fused layers were checked"
    return ExportReport(output, result_bytes(output), dict(types), [note])


def _check_vllm(grids: Mapping[str, Scalar], modules: Sequence[str]) -> None:
    """Raise BillhookError for types, by module, that vLLM does not list or that differ in fused `modules`."""
    advice = "Make them with billhook compress --for vllm, or billhook quantize with --type int4 or int8."
    others = [f"{name} ({grid.name})" for name, grid in grids.items() if grid.bits not in _VLLM_BITS]
    if others:
        raise BillhookError(f"vLLM lists integers of 4 and 8 bits, and {len(others)} layers, such as {others[0]}, are "
                            f"others. {advice}")  # fmt: skip
    for names in fused(modules):
        types = sorted({grids[name].name if name in grids else "16 bits" for name in names})
        if len(types) > 1:
            raise BillhookError(f"vLLM fuses {', '.join(names)}, which differ in type: {', '.join(types)}. {advice}")


def export_tensor_types(model: str | Path, output: str | Path, *, overwrite: bool = False) -> ExportReport:
    """Write the types of a GGUF file, or of the one in a directory, for `llama-quantize --tensor-type-file`.

    There is a line NAME=TYPE for each tensor of at least two dimensions. llama.cpp searches for NAME, a regular
    expression, in the names of tensors, and the first that is found counts, so each is anchored. Raises BillhookError
    for a model without a GGUF file and for an output that exists.
    """
    output = Path(output).expanduser()
    if not (files := gguf_files(model)):
        raise BillhookError(
            f"{model} holds no GGUF file, which has the types of llama.cpp: billhook quantize and compress make it."
        )
    _check_new(output, overwrite, *files)
    types = {x.name: x.type for x in read_gguf(files[0]).tensors.values() if len(x.shape) > 1}
    lines = [f"^{re.escape(name)}$={type}\n" for name, type in types.items()]
    write_text(output, "".join(lines))
    return ExportReport(output, output.stat().st_size, dict(Counter(types.values())), [])


def _check_fits(source: Path, config: Mapping[str, Any]) -> None:
    """Raise BillhookError where the tensors on disk are not those of the model, if its architecture is known."""
    if config.get("model_type") in FAMILIES:
        shards = [read_shard(file) for file in weight_files(source)]
        with loading(source):
            _, model = empty_model(source, shards, task_of_config(source, dict(config)).auto_class, False)
            check_fits(source, model, shards)


def _earlier_parts(output: Path) -> list[Path]:
    """The files that are named like parts of `output`, of any number."""
    return sorted(output.absolute().parent.glob(f"{glob.escape(output.stem)}-[0-9]*-of-[0-9]*.gguf"))


def _check_new(output: Path, overwrite: bool, *read: str | Path | None) -> None:
    """Raise BillhookError for a file that exists and may not be replaced, such as one that is `read`."""
    if output.exists() and not overwrite:
        raise BillhookError(f"The output {output} exists: choose another, or allow replacing it (--overwrite).")
    check_new_file(output, *read)


def gguf_files(model: str | Path) -> list[Path]:
    """The GGUF file that a model is, in all its parts, or those in its directory where it has no other weights."""
    path = Path(model).expanduser()
    return gguf_parts(path) if path.is_file() else sorted(path.glob("*.gguf")) if is_gguf(path) else []


def _open(model: str | Path, output: Path | None = None) -> tuple[Path, dict[str, Any], Record | None]:
    """The directory of a model, quantized or not, its configuration, and its record; `output` as in `resolve`."""
    source = resolve(model, output)
    if is_unfinished(source):
        raise BillhookError(f"{source} is not finished: resume it with the command that started it and --resume.")
    config = check_directory(source, quantized=True)
    if not is_gguf(model):
        return source, config, history(source)
    path = Path(model).expanduser()
    beside = [path / RECORD, path.with_suffix(f".{RECORD}"), path.parent / RECORD]
    found = next((read_record(file) for file in beside[path.is_file() :] if file.is_file()), None)
    known = found is not None and (path.is_dir() or path.name in found.files)
    return source, config, found if known else None


def _step(
    made_by: dict[str, Any],
    source: Path,
    config: Mapping[str, Any],
    digest: str | None,
    notes: list[str],
    result: str | None,
) -> Step:
    model = {"name": source.name, "type": config.get("model_type"), "digest": digest}
    return Step("export", None, made_by, model, notes, result)


def write_decoded(
    source: Path,
    folder: Path,
    config: Mapping[str, Any],
    grids: Mapping[str, Scalar],
    dtype: torch.dtype | None,
    progress: Progress,
) -> None:
    """Write a directory with decoded weights: its configuration, weights and other files."""
    write_dense(source, folder, grids, dtype, progress)
    copy_others(source, folder, {"config.json"})
    own = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
    known = config.get("dtype", config.get("torch_dtype"))
    dtypes = {} if dtype is None and known is None else {"dtype": known if dtype is None else names[dtype]}
    write_json(folder / "config.json", without_missing_entry({**own, **dtypes}, folder), own=False)


def _dense_layers(before: Record, folder: Path) -> dict[str, dict[str, Any]]:
    """The layers of a record whose weights are ordinary now, with the zeros that are counted in the files."""
    shards, found = [read_shard(file) for file in weight_files(folder)], {}
    for name, facts in before.layers.items():
        kept = {key: value for key, value in facts.items() if key != "type"}
        parts = layer_zeros(kept, kept["shape"], shards)
        if parts is None:
            kept = {key: value for key, value in kept.items() if key not in ("index", "transposed", "pieces")}
            found[name] = {**kept, "tensor": None}
        else:
            found[name] = {**kept, "zeros": sum(int(part.sum()) for part in parts)}
    return found
