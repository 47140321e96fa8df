"""Make a GGUF file for llama.cpp of a model directory, with quantized weights in the place of its own.

The file equals that of llama.cpp's `convert_hf_to_gguf.py`, tensor by tensor, where nothing is quantized. What was done
to the model is in the metadata under `billhook.`.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import torch

from billhook.architectures.gguf_config import gguf_sizes, rotary_factors, window_note, yarn_note
from billhook.architectures.gguf_names import FAMILIES, HEAD, GgufTensor, gguf_family, gguf_tensors
from billhook.errors import BillhookError, JobError
from billhook.export.gguf_metadata import Fact, add_facts, add_origin, add_sizes
from billhook.export.gguf_template import Quantized, copy_metadata, matched_entries
from billhook.export.gguf_tokenizer import add_tokenizer
from billhook.export.gguf_writer import Entry, ExportReport, add_tensors, add_types, byte_shape, finish, whole_size
from billhook.store.checkpoint import check_directory, loading
from billhook.store.files import untrusted
from billhook.store.gguf_file import GgufFile, read_gguf, require_gguf
from billhook.store.shards import Shard, read_shard, weight_files
from billhook.store.tensor_bytes import read_tensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = ("auto", "f16", "bf16", "f32", "q8_0")
_CHUNK = 1 << 24  # numbers that are converted at once
_AS_STORED = {"BF16": "bf16", "F16": "f16"}


class GgufForm(TypedDict):
    """The options of a GGUF file: its template, and how many bytes of tensors go to one of several files."""

    template: Path | None
    split: int | None


def write_gguf(
    source: Path,
    output: Path,
    quantized: Quantized | None = None,
    *,
    rest: str = "auto",
    template: Path | None = None,
    split: int | None = None,
    facts: Mapping[str, Fact] | None = None,
    changed: Sequence[Path] = (),
    progress: Callable[[str], None] = lambda tensor: None,
) -> ExportReport:
    """Write the model directory `source` to the file `output`.

    `quantized` maps names of tensors on disk to a GGUF type (`q4_k`) and packed bytes, uint8 [out, n], or [experts,
    out, n] for a tensor of three dimensions; they may be memory-mapped, and each is read once. The experts of a layer
    share a type. The other tensors get the type `rest`: "auto" is that of the checkpoint, or f16 for float32. The
    metadata and the tokenizer are those of the GGUF file `template`, if there is one; where the names of the model's
    tensors are not known, so are the names and the tensors that are not quantized. Tensors of more than `split` bytes
    together go to several files (`billhook.export.gguf_writer.write`). `facts` are added to the metadata under
    `billhook.`. What is not quantized comes from the safetensors files `changed` where it is in them. `progress` is
    called after each tensor.

    Raises BillhookError, before anything is written, for a model that has no form in GGUF files, and JobError for
    values that do not fit their type and for a full disk.
    """
    quantized, facts = quantized or {}, facts or {}
    writer, entries, notes = _prepared(source, quantized, rest, template, split, facts, changed=changed)
    return finish(writer, entries, notes, output, progress)


def gguf_bytes(
    source: Path,
    quantized: Quantized,
    *,
    template: Path | None = None,
    split: int | None = None,
    facts: Mapping[str, Fact],
) -> int:
    """The size of the file that `write_gguf` would write, of which only the header is made; the same errors."""
    return whole_size(*_prepared(source, quantized, "auto", template, split, facts)[:2])


def _prepared(
    source: Path,
    quantized: Quantized,
    rest: str,
    template: Path | None,
    split: int | None,
    facts: Mapping[str, Fact],
    *,
    changed: Sequence[Path] = (),
) -> tuple["GGUFWriter", list[Entry], list[str]]:
    """A writer with the complete metadata, the tensors, and notes on what llama.cpp computes otherwise."""
    require_gguf()
    import gguf

    config = check_directory(source)
    model, notes = None if template is None else read_gguf(template), list[str]()
    with _damaged(source):
        place = _placed(weight_files(source))
        place |= {name: shard for name, shard in _placed(changed).items() if name not in quantized}
        if model is None or config.get("model_type") in FAMILIES:
            config = full_config(source)
            entries = _entries(source, place, config, quantized, rest)
        else:
            entries = matched_entries(model, quantized, partial(_rows, place))
        arch = gguf_family(config).arch if model is None else model.arch
        writer = gguf.GGUFWriter(None, arch, split_max_size=split or 0)
        add_tensors(writer, entries)
        if model is None:
            family = gguf_family(config)
            add_origin(writer, source)
            add_sizes(writer, gguf_sizes(family, config))
            notes = window_note(family, config) + yarn_note(config) + add_tokenizer(writer, source, config)
        else:
            _check_template(model, entries)
            copy_metadata(writer, model)
    add_facts(writer, facts)
    add_types(writer, entries)
    return writer, entries, notes


def full_config(source: Path) -> dict[str, Any]:
    """The configuration of a model directory with its defaults filled in."""
    from transformers import AutoConfig

    with loading(source):
        config: dict[str, Any] = AutoConfig.from_pretrained(source, local_files_only=True).to_dict()
    return config


@contextmanager
def _damaged(source: Path) -> Iterator[None]:
    """Turn errors about files of the model that are not as they should be into BillhookError, without log messages."""
    loggers = [logging.getLogger(name) for name in ("gguf", "metadata")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with untrusted(f"The configuration or the tokenizer of {source} is damaged", "Copy or download it again."):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _check_template(template: GgufFile, entries: Sequence[Entry]) -> None:
    """Raise BillhookError unless a template has the tensors that will be written, in their shapes."""
    for entry in entries:
        other = template.tensors.get(entry.name)
        if other is None or other.shape != entry.shape:
            has = "no such tensor" if other is None else f"one of {list(other.shape)}"
            raise BillhookError(f"{entry.name} is {list(entry.shape)} in the model, and {template.path} has {has}.")


def _placed(files: Iterable[Path]) -> dict[str, Shard]:
    """The file of each tensor."""
    return {name: shard for file in files for shard in [read_shard(file)] for name in shard.entries}


def _rows(place: Mapping[str, Shard], name: str, kind: str) -> Iterator[np.ndarray]:
    """The rows of a tensor on disk in a type that is not quantized, uint8 [rows, n], in parts."""
    return _parts(GgufTensor(name, (name,), place[name].entries[name].shape), kind, place, None)


def _entries(
    source: Path, place: Mapping[str, Shard], config: Mapping[str, Any], quantized: Quantized, rest: str
) -> list[Entry]:
    shapes = {name: shard.entries[name].shape for name, shard in place.items()}
    if unknown := sorted(set(quantized) - set(shapes)):
        raise BillhookError(f"{source} has no tensor {unknown[0]}, which was quantized.")
    _check_head(source, place, config)
    if rest == "auto":
        kinds = (place[name].entries[name].dtype for name, shape in shapes.items() if len(shape) > 1)
        rest = next((_AS_STORED[kind] for kind in kinds if kind in _AS_STORED), "f16")
    entries = [_factors(name, values) for name, values in rotary_factors(gguf_family(config), config).items()]
    for tensor in gguf_tensors(config, shapes):
        kind = _given_type(tensor, shapes, quantized) or _plain_type(tensor, rest)
        given = quantized if tensor.sources[0] in quantized else None
        entries.append(Entry(tensor.name, kind, tensor.shape, partial(_parts, tensor, kind, place, given)))
    return entries


def _check_head(source: Path, place: Mapping[str, Shard], config: Mapping[str, Any]) -> None:
    """Raise BillhookError for a Gemma model whose files hold a head that is not its embedding."""
    embedding = next((name for name in place if name.endswith("embed_tokens.weight")), None)
    if not gguf_family(config).shift or HEAD not in place or embedding is None:
        return
    one, two = (read_tensor(place[name].path, place[name].entries[name]) for name in (HEAD, embedding))
    if not torch.equal(one, two):
        raise BillhookError(
            f"llama.cpp computes {config['model_type']} models with their embedding as head, and {source.name} has "
            "another one."
        )


def _factors(name: str, values: torch.Tensor) -> Entry:
    return Entry(name, "f32", tuple(values.shape), lambda: [values.numpy()])


def _given_type(tensor: GgufTensor, shapes: Mapping[str, tuple[int, ...]], quantized: Quantized) -> str | None:
    """The type of the packed bytes of a tensor, or None; raises BillhookError where they do not fit it."""
    kinds = {quantized[name][0].lower() if name in quantized else None for name in tensor.sources}
    if len(kinds) > 1:
        raise BillhookError(
            f"The experts of {tensor.name} must share a type, and theirs are {sorted(map(str, kinds))}."
        )
    if (kind := kinds.pop()) is None:
        return None
    for name in tensor.sources:
        found, wanted = tuple(quantized[name][1].shape), byte_shape(name, shapes[name], kind)
        if found != wanted:
            raise BillhookError(f"{name}: {kind} needs bytes of the shape {list(wanted)}, found {list(found)}.")
    return kind


def _plain_type(tensor: GgufTensor, rest: str) -> str:
    """The type of a tensor that is not quantized, as llama.cpp's converter chooses it."""
    name, shape = tensor.name, tensor.shape
    if len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight") or ".ffn_gate_inp" in name:
        return "f32"
    return "f16" if rest == "q8_0" and shape[-1] % 32 else rest


def _parts(tensor: GgufTensor, kind: str, place: Mapping[str, Shard], given: Quantized | None) -> Iterator[np.ndarray]:
    """The bytes of a tensor, in parts."""
    import gguf

    for name in tensor.sources:
        if given is not None:
            yield tensor.pick(np.asarray(given[name][1], np.uint8))
            continue
        values = read_tensor(place[name].path, place[name].entries[name])  # without mapping a whole file
        if tensor.rows is not None:
            values = values.index_select(max(0, values.ndim - 2), torch.from_numpy(tensor.rows))
        rows = values.reshape(-1, values.shape[-1])
        for part in rows.split(max(1, _CHUNK // rows.shape[1])):
            numbers = part.float().numpy() + np.float32(tensor.shift)
            if not np.isfinite(numbers).all():
                raise JobError(f"{name} holds NaN or infinite values: the model is damaged.")
            with np.errstate(over="ignore"):
                packed = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind.upper()])
            if kind == "f16" and not np.isfinite(packed).all():
                raise JobError(f"{name} holds values that do not fit f16: use --type bf16 or f32.")
            yield packed.view(np.uint8)
