"""Write a changed model as a directory that stock `transformers` opens, with the layout of the directory it came from.

Every weight file of the source is written again with the same tensors, names, order, dtypes and metadata, only with the
values of the model in memory (in the dtype on disk); every other file (config, tokenizer, generation config, code,
licence) is copied byte for byte. Where `transformers` renamed or fused tensors while loading, its own reverse
conversion is used; where that does not lead back to the names on disk, `save_pretrained` chooses the layout and the
result says so.

All of it happens in a directory that takes the output's name at the very end (`billhook.store.output`).
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from billhook.errors import JobError
from billhook.store.checkpoint import quiet
from billhook.store.files import copy_files, sha256, write_json
from billhook.store.layout import CARD, GRADIENTS, PAGE, RECORD, REPORT, UNFINISHED
from billhook.store.locate import locate_on_disk, to_disk
from billhook.store.output import check_output, staging
from billhook.store.record import completed
from billhook.store.shards import INDEX, Entry, Shard, lay_out, layer_zeros, put, read_shard, weight_files
from billhook.store.tensor_bytes import DTYPES, tensor_bytes

WEIGHTS = frozenset(
    {
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".h5",
        ".msgpack",
        ".gguf",
        ".onnx",
        ".onnx_data",
        ".npz",
        ".ot",
        ".pkl",
    }
)


@dataclass(frozen=True)
class Saved:
    """What was written: SHA-256 by file name (billhook.json apart), and a note when the layout is not that of the
    source."""

    path: Path
    files: dict[str, str]
    note: str | None


def save_pruned(
    model: PreTrainedModel,
    source: Path | None,
    output: Path,
    *,
    record: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    publish: Callable[[Path], object] = lambda folder: None,
) -> Saved:
    """Write `model`, loaded from the directory `source` (None: built in memory) and changed since, to `output`.

    `record` becomes billhook.json: `files` (checksums) and the digest of the last step's result are added, and each of
    its `layers`, which name a parameter in memory (`tensor`, `index`, `transposed`), gets its place on disk instead
    (`billhook.store.locate`). `texts` are further files by name. `publish` is called with the directory once the record
    is in it, to add files made from the record (`billhook.reports.publishing.publish`). Raises what `check_output`
    raises, JobError when writing fails or a value does not fit the dtype on disk.
    """
    needed = (
        sum(file.stat().st_size for file in weight_files(source))
        if source
        else sum(p.nbytes for p in model.parameters())
    )
    output = check_output(output, source, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        note = _write_weights(model, source, folder)
        files = complete(model, source, folder, record, texts, publish=publish)
    return Saved(output, files, note)


def complete(
    model: PreTrainedModel,
    source: Path | None,
    folder: Path,
    record: Mapping[str, Any] | None,
    texts: Mapping[str, str] | None = None,
    *,
    publish: Callable[[Path], object] = lambda folder: None,
) -> dict[str, str]:
    """Add to the weights in `folder` all other files of `source`, `texts`, billhook.json and what `publish` writes;
    returns the checksums.

    See `save_pruned`.
    """
    if source is not None:
        copy_files(source, folder, _is_kept)  # in place of what `save_pretrained` may have written under the same names
    for name, text in (texts or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    files = checksums(folder)
    if record is not None:
        layers = _found_on_disk(model, record.get("layers", {}), folder)
        write_json(folder / RECORD, completed(record, layers, files))
        publish(folder)
    return files


def _found_on_disk(
    model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """The layers of billhook.json with their places on disk, their zeros counted there (of a layer that was left alone
    they are not known before); raises JobError when some are lost."""
    shards = [read_shard(file) for file in weight_files(folder)]
    where = locate_on_disk(model, layers, {name for shard in shards for name in shard.entries})
    found = {}
    for name, facts in layers.items():
        kept = {key: value for key, value in facts.items() if key not in ("tensor", "index", "transposed", "pieces")}
        parts, known = layer_zeros(where[name], facts["shape"], shards), facts.get("zeros")
        zeros = (known or 0) if parts is None else sum(int(part.sum()) for part in parts)
        if known is not None and zeros < known:
            raise JobError(f"{name} has {zeros} zeros in the files written where the model has {known}.")
        if known is not None and zeros > known:
            kept["notes"] = [*facts.get("notes", ()), f"{zeros - known} weights became zero in the dtype on disk"]
        found[name] = {**kept, "zeros": zeros, **where[name]}
    return found


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file under `directory` except those about itself or an unfinished run, by path relative to it,
    in order of name."""
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    files = [
        name for name in files if name not in (RECORD, UNFINISHED, REPORT, CARD, PAGE) and not name.endswith(GRADIENTS)
    ]
    return {name: sha256(directory / name) for name in files}


def _is_kept(path: Path) -> bool:
    """Whether a file of the source holds no weights and tells of no earlier run; `path` is relative to the source."""
    weights = path.suffix in WEIGHTS or path.name.endswith(".index.json")
    return not (weights or path.name.startswith(".") or path.name in (RECORD, UNFINISHED, REPORT, PAGE))


def _write_weights(model: PreTrainedModel, source: Path | None, folder: Path) -> str | None:
    shards = [read_shard(file) for file in weight_files(source)] if source else []
    if source is None or not shards:
        _write_stock(model, folder, [])
        return None
    reason = mismatch(model, shards)
    if reason:
        _write_stock(model, folder, shards)
        return (
            f"The weights do not lead back to the layout of {source} ({reason}); they were written in transformers' "
            "own."
        )
    tensors = on_disk(model, model.state_dict(), shards)
    lay_out_all(shards, source, folder, lambda name: name not in tensors)
    write_tensors(shards, folder, tensors)
    return None


def lay_out_all(shards: Sequence[Shard], source: Path, folder: Path, copied: Callable[[str], bool]) -> None:
    """Write all weight files of `source`, with the values of the `copied` tensors (see
    `billhook.store.shards.lay_out`), and its index."""
    for shard in shards:
        lay_out(shard, folder / shard.path.name, copied)
    if (source / INDEX).is_file():
        shutil.copyfile(source / INDEX, folder / INDEX)


def on_disk(model: PreTrainedModel, state: Mapping[str, Tensor], shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The tensors that a model's directory has of `state`, by their names there."""
    names = {name for shard in shards for name in shard.entries}
    return {name: tensor for name, tensor in to_disk(model, state, names).items() if name in names}


def mismatch(model: PreTrainedModel, shards: Sequence[Shard]) -> str | None:
    """Why the layout of `shards` cannot take the tensors of `model`, which may be without values, or None. A tied
    weight needs to be on disk under one name only."""
    entries = {name: entry for shard in shards for name, entry in shard.entries.items()}
    tensors = to_disk(model, model.state_dict(), entries)
    written = {tensors[name].data_ptr() for name in entries if name in tensors and not tensors[name].is_meta}
    for name, tensor in tensors.items():
        if name not in entries and (tensor.is_meta or tensor.data_ptr() not in written):
            return f"{name} is not there"
        if name in entries and (entries[name].shape != tuple(tensor.shape) or entries[name].dtype not in DTYPES):
            return f"{name} is {entries[name].dtype} {list(entries[name].shape)} there"
    return None


def write_tensors(shards: Sequence[Shard], folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to their places in the files of `folder`, which are laid out like `shards`, in the dtypes there,
    and force them to the disk. Raises JobError for a value that does not fit."""
    for shard in shards:
        mine = [entry for entry in shard.entries.values() if entry.name in tensors]
        if mine:
            with open(folder / shard.path.name, "r+b", buffering=0) as file:
                for entry in mine:
                    put(file.fileno(), entry.start, _bytes(tensors[entry.name], entry))
                os.fsync(file.fileno())


def _bytes(tensor: Tensor, entry: Entry) -> memoryview:
    """The little-endian bytes of `tensor` in the dtype of `entry`."""
    value = tensor.detach().to("cpu", DTYPES[entry.dtype])
    if value.dtype != tensor.dtype and value.is_floating_point() and not torch.isfinite(value).all():
        raise JobError(f"{entry.name} holds values that do not fit {entry.dtype}, its dtype on disk.")
    return tensor_bytes(value.contiguous())


def _write_stock(model: PreTrainedModel, folder: Path, shards: list[Shard]) -> None:
    """`save_pretrained`, in the dtype and the shard size of the source's files when there are any."""
    options: dict[str, Any] = {}
    if shards:
        options["max_shard_size"] = max(sum(e.stop - e.start for e in shard.entries.values()) for shard in shards)
        most = Counter(entry.dtype for shard in shards for entry in shard.entries.values()).most_common(1)[0][0]
        options["state_dict"] = _cast(model.state_dict(), DTYPES.get(most, model.dtype))
    with quiet():
        model.save_pretrained(folder, **options)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the floating-point tensors; tensors that share memory still share it afterwards."""
    done: dict[int, Tensor] = {}
    return {k: done.setdefault(v.data_ptr(), v.to(dtype)) if v.is_floating_point() else v for k, v in state.items()}
