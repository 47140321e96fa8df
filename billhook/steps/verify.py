"""Check a pruned directory against its billhook.json, from the files on disk alone.

Counted are the zeros of every tensor as it is stored, one tensor in memory at a time and no model built: this is what
another program will load, whatever was in memory when it was written. Checked are: zeros against what was achieved and
what was planned, N:M groups along the input dimension, the SHA-256 of every file, weight files that nobody listed, and
that the configuration loads. It does not know whether the model is any good; that is what
`billhook.evaluation.perplexity` is for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from billhook.errors import BillhookError
from billhook.plan.plan import Plan
from billhook.store.files import read_json, sha256
from billhook.store.layout import RECORD, is_packed, is_unfinished
from billhook.store.shards import Shard, layer_zeros, read_shard, weight_files

VERSION = 1
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class Verification:
    """What was found: `layers` counted, `zeros` of `weights` in them, and every difference in words."""

    directory: str
    layers: int
    zeros: int
    weights: int
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything is as recorded."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """All fields and `ok`, for json."""
        return {"ok": self.ok, **asdict(self)}


def verify(directory: str | Path, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Compare a directory with its billhook.json, and a packed one with its own record; `progress(done, all)` is called
    after each layer.

    Raises BillhookError when there is no such record or it is not one; every other difference is a line in `problems`.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise BillhookError(f"There is no directory {directory}.")
    if is_unfinished(directory):
        raise BillhookError(f"{directory} is not finished: continue it with the command that began it and --resume.")
    if not is_packed(directory):
        record = _read(directory / RECORD)
        problems = [
            *_check_files(directory, record["files"]),
            *_unlisted(directory, record["files"]),
            *_check_config(directory),
        ]
        return _count_layers(directory, record, problems, *_open(directory), progress)
    from billhook.packed.check import examine

    seen = examine(directory)
    problems = [*seen.problems, *_check_config(directory)]
    if seen.problems or not (directory / RECORD).is_file():
        return Verification(str(directory), seen.layers, seen.zeros, seen.weights, problems)
    record = _read(directory / RECORD)
    files = {name: digest for name, digest in record["files"].items() if not (seen.rounded and name in seen.digests)}
    problems += _check_files(directory, files, seen.digests)
    return _count_layers(directory, record, problems, seen.shards, [], progress)


def _count_layers(
    directory: Path,
    record: Mapping[str, Any],
    problems: list[str],
    shards: Sequence[Shard],
    damaged: list[str],
    progress: Callable[[int, int], None] | None,
) -> Verification:
    """Count the zeros of every layer of billhook.json; `problems` found before come first."""
    problems = problems + damaged
    try:
        expected = _expectations(record)
    except BillhookError as error:
        return Verification(str(directory), 0, 0, 0, [*problems, str(error)])
    unplaced = {} if damaged or all(_placed(e.facts) for e in expected) else _zeros_in_memory(directory)
    found, weights, counted = 0, 0, 0
    for done, layer in enumerate(expected, start=1):
        parts = _zeros_on_disk(layer, shards) if _placed(layer.facts) else unplaced.get(layer.name)
        if parts is not None:
            problems += _check_layer(layer, parts)
            counted, found, weights = counted + 1, found + _count(parts), weights + layer.shape[0] * layer.shape[1]
        elif not damaged:
            problems.append(f"{layer.name}: its weights are not where {RECORD} says.")
        if progress is not None:
            progress(done, len(expected))
    return Verification(str(directory), counted, found, weights, problems)


@dataclass(frozen=True)
class _Expected:
    """What billhook.json says of one layer; `groups` is (zeros, of) for N:M, `slack` the weights by which a count may
    miss the plan."""

    name: str
    shape: tuple[int, int]
    facts: Mapping[str, Any]
    planned: int
    slack: float
    groups: tuple[int, int] | None


def _read(path: Path) -> dict[str, Any]:
    """Read billhook.json and check its form, as far as this module relies on it."""
    record = read_json(path, "record of a pruned model")
    if record.get("version") != VERSION:
        raise BillhookError(f"{path} is not a record of version {VERSION} (found {record.get('version')!r}).")
    for key in ("plan", "layers", "files"):
        if not isinstance(record.get(key), dict) or not record[key]:
            raise BillhookError(f"{path} has no {key!r}: it is not a record of a pruned model.")
    for name, facts in record["layers"].items():
        shape = facts.get("shape") if isinstance(facts, dict) else None
        whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
        if not whole or type(facts.get("zeros")) is not int:
            raise BillhookError(f"{path}: the layer {name} needs `shape` [out, in] and `zeros`.")
    for name in record["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BillhookError(f"{path} lists the file {name!r}, which lies elsewhere.")
    return record


def _expectations(record: Mapping[str, Any]) -> list[_Expected]:
    plan = Plan.from_json(record["plan"], RECORD)
    shapes = {name: (facts["shape"][0], facts["shape"][1]) for name, facts in record["layers"].items()}
    plan.check(shapes)
    planned = plan.zeros(shapes)
    made_by = record.get("made_by")
    floor = isinstance(made_by, dict) and made_by.get("rounding") == "floor"
    expected = []
    for name, facts in record["layers"].items():
        out, columns = shapes[name]
        # The published counts are rounded down in each row, and a published threshold takes ties along.
        slack = out + 0.01 * out * columns if floor else 1
        of = plan.pattern.of
        groups = None if of is None else (of - plan.pattern.kept(plan.sparsity[name]), of)
        if facts.get("sparsity") != plan.sparsity[name]:
            raise BillhookError(
                f"{name}: the plan says sparsity {plan.sparsity[name]}, the layer {facts.get('sparsity')}; one "
                "was edited."
            )
        expected.append(_Expected(name, (out, columns), facts, planned[name], slack, groups))
    return expected


def _check_files(directory: Path, files: Mapping[str, str], known: Mapping[str, str] | None = None) -> Iterator[str]:
    """Compare the SHA-256 of files; of some it is `known` without reading them."""
    found = dict(known or {})
    for name, digest in files.items():
        if name not in found and not (directory / name).is_file():
            yield f"{name} is missing."
        elif (found.get(name) or sha256(directory / name)) != digest:
            yield f"{name} is not the file that was written: its SHA-256 differs."


def _unlisted(directory: Path, files: Mapping[str, str]) -> Iterator[str]:
    for path in sorted(directory.iterdir()):
        # transformers would read a model.safetensors that someone put beside the shards, and never the shards.
        if path.suffix in _WEIGHTS and path.name not in files:
            yield f"{path.name} holds weights and is not listed in {RECORD}."


def _check_config(directory: Path) -> Iterator[str]:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        yield f"config.json cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _open(directory: Path) -> tuple[list[Shard], list[str]]:
    """The weight files that can be read, and what is wrong with the others."""
    try:
        paths = weight_files(directory)
    except BillhookError as error:
        return [], [str(error)]
    shards, problems = [], [] if paths else [f"{directory} holds no safetensors."]
    for path in paths:
        try:
            shards.append(read_shard(path))
        except BillhookError as error:
            problems.append(str(error))
    return shards, problems


def _placed(facts: Mapping[str, Any]) -> bool:
    return "pieces" in facts or facts.get("tensor") is not None


def _zeros_on_disk(layer: _Expected, shards: Sequence[Shard]) -> list[np.ndarray] | None:
    try:
        return layer_zeros(layer.facts, layer.shape, shards)
    except (TypeError, KeyError, IndexError, AttributeError):  # a place that a person wrote
        return None


def _count(parts: list[np.ndarray]) -> int:
    return sum(int(part.sum()) for part in parts)


def _check_layer(layer: _Expected, parts: list[np.ndarray]) -> Iterator[str]:
    count, recorded = _count(parts), layer.facts["zeros"]
    if count != recorded:
        yield f"{layer.name}: {count} zeros on disk, {recorded} recorded."
    # More than planned is right where weights were zero before; then the layer's notes say so.
    if count < layer.planned - layer.slack or (count > layer.planned + layer.slack and not layer.facts.get("notes")):
        yield f"{layer.name}: {count} zeros on disk, {layer.planned} planned."
    if layer.groups is not None:
        least, of = layer.groups
        short = sum(int((part.reshape(len(part), -1, of).sum(2) < least).sum()) for part in parts)
        if short:
            yield f"{layer.name}: {short} groups of {of} have fewer than {least} zeros."


def _zeros_in_memory(directory: Path) -> dict[str, list[np.ndarray]]:
    """For a model whose layers have no place on disk of their own: load it, and count there."""
    from billhook.architectures.layers import find_layers
    from billhook.tasks.opening import load_model

    return {layer.name: [(layer.weight == 0).numpy()] for layer in find_layers(load_model(directory))}
