"""Write a changed model as a directory that stock `transformers` opens.

The weights are written by a sink (`billhook.store.sinks`); every other file of the source (configuration, tokenizer,
code, licence) is copied byte for byte. Everything is written to a temporary directory, which is renamed to the output
at the end (`billhook.store.output`).
"""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from billhook.ambient import pinned
from billhook.errors import JobError
from billhook.store.files import copy_files, read_json, sha256, write_json
from billhook.store.layout import CARD, GRADIENTS, PAGE, RECORD, REPORT, SHAPE, TRAINING, UNFINISHED, WRITTEN
from billhook.store.locate import locate_on_disk
from billhook.store.output import check_output, staging
from billhook.store.record import completed
from billhook.store.shards import layer_zeros, read_shard, weight_bytes, weight_files, without_missing_entry
from billhook.store.sinks import choose_sink

# suffixes of files that hold weights
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz"))
_WEIGHTS |= {".ot", ".pkl", ".distcp", ".tflite", ".mlmodel", ".pb"}
# how the names of parts of ONNX and TensorFlow files end: model.onnx_data, model.onnx_data_1, x.data-00000-of-00001
_PARTS = re.compile(r"(\.onnx[._]data([._-]\d+)?|\.data-\d{5}-of-\d{5})$")
_FOLDERS = (".mlpackage", ".mlmodelc")  # of Core ML
_BESIDE = (".xml", ".param", ".index", ".meta")  # of no use without weights of the same name: OpenVINO, TensorFlow
# with the first, `transformers` would look for adapter weights; with the second, others would expect quantized ones
_ABOUT_WEIGHTS = ("adapter_config.json", "hf_quant_config.json")
_MODULES = "modules.json"  # of sentence-transformers: the model and what follows it, each with its folder

_NAMED = 5  # of files in a note
_PLACE = ("tensor", "index", "transposed", "rows", "pieces")  # where a layer is


@dataclass(frozen=True)
class Saved:
    """What was written: SHA-256 by file name (without billhook.json), and a note when the layout is not the
    source's."""

    path: Path
    files: dict[str, str]
    note: str | None


@pinned
def save_pruned(
    model: PreTrainedModel,
    source: Path | None,
    output: Path,
    *,
    record: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    publish: Callable[[Path], object] = lambda folder: None,
) -> Saved:
    """Write `model`, which was loaded from the directory `source` (None: built in memory) and changed, to `output`.

    `record` becomes billhook.json, with checksums, the digest of the last step's result, and the place on disk of each
    layer (`billhook.store.locate`) instead of its place in memory (`tensor`, `index`, `transposed`). `publish` is then
    called with the directory, to add files made from the record. Raises what `check_output` raises, and JobError when
    writing fails or a value does not fit the dtype on disk.
    """
    needed = sum(p.nbytes for p in model.parameters()) if source is None else weight_bytes(source)
    output = check_output(output, source, overwrite=overwrite, needed=needed)
    with staging(output, needed) as folder:
        sink, note = choose_sink(model, source)
        sink.write_all(folder)
        files = complete(model, source, folder, record, publish)
    return Saved(output, files, note)


def complete(
    model: PreTrainedModel,
    source: Path | None,
    folder: Path,
    record: Mapping[str, Any] | None,
    publish: Callable[[Path], object],
    config: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Add all other files of `source`, billhook.json and what `publish` writes to the weights in `folder`; returns the
    checksums. `config` are new entries of config.json. See `save_pruned`."""
    if source is not None:
        copy_others(source, folder)  # they replace those of `save_pretrained`
    copied = read_json(folder / "config.json", "model configuration", own=False)
    if (fitting := without_missing_entry({**copied, **(config or {})}, folder)) != copied:
        write_json(folder / "config.json", fitting, own=False)
    files = checksums(folder)
    if record is not None:
        layers = _found_on_disk(model, record.get("layers", {}), folder)
        write_json(folder / RECORD, completed(record, layers, files))
        publish(folder)
    return files


def _found_on_disk(
    model: PreTrainedModel, layers: Mapping[str, Mapping[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """The layers of billhook.json with their places on disk and the zeros counted there; raises JobError for fewer
    zeros than in memory."""
    shards = [read_shard(file) for file in weight_files(folder)]
    found = {name: dict(facts) for name, facts in layers.items() if facts.get("type")}  # quantized: places are known
    layers = {name: facts for name, facts in layers.items() if name not in found}
    where = locate_on_disk(model, layers, {name for shard in shards for name in shard.entries})
    for name, facts in layers.items():
        kept = {key: value for key, value in facts.items() if key not in _PLACE}
        parts, known = layer_zeros(where[name], facts["shape"], shards), facts.get("zeros")
        zeros = (known or 0) if parts is None else sum(int(part.sum()) for part in parts)
        if known is not None and zeros < known and facts.get("sparsity") != 0:
            raise JobError(f"{name} has {zeros} zeros in the files written where the model has {known}.")
        if known is not None and zeros > known:
            kept["notes"] = [*facts.get("notes", ()), f"{zeros - known} weights became zero in the dtype on disk"]
        found[name] = {**kept, "zeros": zeros, **where[name]}
    return found


def checksums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file under `directory` except those about itself or an unfinished run, by path relative to it,
    in order of name."""
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    about = (RECORD, UNFINISHED, REPORT, CARD, PAGE, SHAPE, WRITTEN)
    others = (GRADIENTS, TRAINING)
    return {name: sha256(directory / name) for name in files if name not in about and not name.endswith(others)}


def weights_in(source: Path) -> Callable[[Path], bool]:
    """Whether a file of the source, by its relative path, holds weights of the model, in whatever format."""
    others = _of_modules(source)
    return lambda path: _holds_weights(source, path) and not others(path)


def _holds_weights(source: Path, path: Path) -> bool:
    """Whether a file, by its relative path, holds weights, or is of no use without the file beside it that does."""
    if _is_weights(path):
        return True
    beside = (source / path).parent.iterdir() if path.suffix in _BESIDE else ()
    return any(other.stem == path.stem and _is_weights(other) for other in beside)


def _is_weights(path: Path) -> bool:
    named = path.suffix in _WEIGHTS or _PARTS.search(path.name) is not None
    return named or any(part.endswith(_FOLDERS) for part in path.parts[:-1])


def copy_others(source: Path, folder: Path, without: Collection[str] = ()) -> None:
    """Copy the files of `copied_from`, except those named in `without`; logs a note of weights in other formats, which
    are left out."""
    copied, is_weights = copied_from(source), weights_in(source)
    copy_files(source, folder, lambda path: copied(path) and path.as_posix() not in without)
    found = (path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file())
    own = {path.name for path in weight_files(source)}
    left = [path for path in found if is_weights(path) and str(path) not in own and not path.match("pytorch_model*")]
    if left:
        named = ", ".join(map(str, left[:_NAMED])) + (", ..." if len(left) > _NAMED else "")
        note = "note: files with the unchanged weights, in other formats or folders, were left out (%d): %s."
        logging.getLogger(__name__).warning(note, len(left), named)


def copied_from(source: Path) -> Callable[[Path], bool]:
    """Whether a file of the source, by its relative path, is copied: neither weights of the model, nor what describes
    them, nor a record of an earlier run."""
    others = _of_modules(source)

    def copied(path: Path) -> bool:
        own = path.name.startswith(".") or path.name in (RECORD, UNFINISHED, REPORT, PAGE, SHAPE)
        weights = _holds_weights(source, path) or path.name.endswith(".index.json") or path.name in _ABOUT_WEIGHTS
        return not own and (others(path) or not weights)

    return copied


def _of_modules(source: Path) -> Callable[[Path], bool]:
    """Whether a file, by its relative path, is in the folder of one of the other modules that modules.json lists; false
    where that is not of the form that sentence-transformers writes."""
    folders = set[Path]()
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        modules = json.loads((source / _MODULES).read_text(encoding="utf-8"))
        folders = {Path(module["path"]) for module in modules} - {Path()}
    return lambda path: not folders.isdisjoint(path.parents)
