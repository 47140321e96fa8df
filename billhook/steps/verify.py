"""Check a directory against its billhook.json, using only the files on disk.

The zeros of every stored tensor are counted, one tensor in memory at a time, without building a model. For every step,
the zeros of its plan are checked, and that its input was the output of the step before; for the last plan of each
layer, its N:M groups; for the directory, the recorded zeros, the SHA-256 of every file, weight files that are not
listed, and that the configuration loads. The quality of the model is not checked.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from billhook.ambient import pinned
from billhook.architectures.sources import resolve
from billhook.errors import BillhookError
from billhook.export import compressed_tensors
from billhook.plan.plan import Plan
from billhook.steps.verify_chain import check_chain, check_recovered, step_name
from billhook.steps.verify_files import check_config, check_files, unlisted_weights
from billhook.steps.verify_gguf import examine_gguf
from billhook.steps.verify_source import changed_weights
from billhook.steps.verify_units import check_units
from billhook.store import not_a_model
from billhook.store.arguments import check_argument
from billhook.store.layout import RECORD, is_packed, is_unfinished
from billhook.store.record import REFILLED, Record, Step, located, read_record
from billhook.store.shards import Shard, layer_zeros, read_shard, weight_files

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Verification:
    """What `billhook verify` found.

    * `ok` (boolean): whether everything is as recorded (the exit code is 1 if not).
    * `directory`: what was checked.
    * `steps`: steps recorded.
    * `layers`: layers counted.
    * `zeros`: zeros found in them.
    * `weights`: weights in them.
    * `problems`: every difference, as a sentence.
    """

    directory: str
    steps: int
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


@pinned
def verify(
    directory: str | Path, progress: Progress = lambda layer: None, *, source: str | Path | None = None
) -> Verification:
    """Compare a directory with its billhook.json, and a packed one with the record of packing too.

    `progress` is called with the name of each checked layer. With `source`, the model from which a step started, the
    weights that no step updated are compared with it byte by byte. Raises BillhookError for a missing or damaged
    record; every other difference is a line in `problems`.
    """
    check_argument("directory", directory, str | Path)
    directory = Path(directory).expanduser()
    if directory.is_file():
        here = (directory.parent / RECORD).is_file()
        what = f"no {RECORD} beside it says what to check: verify the directory from which it was exported"
        what = f"verify its directory, {directory.parent}, which holds {RECORD}" if here else what
        raise BillhookError(f"{directory} is a file: {what}.")
    if not directory.is_dir():
        raise BillhookError(f"There is no directory {directory}.")
    if is_unfinished(directory):
        raise BillhookError(f"{directory} is not finished: resume it with the command that started it and --resume.")
    if (directory / "adapter_config.json").is_file():
        raise BillhookError(not_a_model.directory(directory))
    if not is_packed(directory):
        record = read_record(directory / RECORD)
        problems = [*check_files(directory, record.files), *unlisted_weights(directory, record.files)]
        if gguf := sorted(name for name in record.files if name.endswith(".gguf") and "/" not in name):
            zeros, weights, found = examine_gguf(directory / gguf[0], record, progress)
            problems += [*check_chain(record), *found]
            return Verification(str(directory), len(record.steps), len(record.layers), zeros, weights, problems)
        shards, damaged = _open(directory)
        problems += [*check_config(directory, shards), *_check_finite(shards), *check_units(record)]
        problems += check_recovered(record)
        if source is not None:
            problems += changed_weights(shards, record, resolve(source))
        return _check_record(directory, record, problems, shards, damaged, progress)
    if source is not None:
        raise BillhookError(f"{directory} is packed: unpack it first, to compare it with {source}.")
    from billhook.packed.check import examine

    seen = examine(directory)
    problems = [*seen.problems, *check_config(directory, seen.shards)]
    if seen.problems or not (directory / RECORD).is_file():
        return Verification(str(directory), 0, seen.layers, seen.zeros, seen.weights, problems)
    record = read_record(directory / RECORD)
    files = {name: digest for name, digest in record.files.items() if not (seen.rounded and name in seen.digests)}
    problems += check_files(directory, files, seen.digests)
    return _check_record(directory, record, problems, seen.shards, [], progress)


def _check_record(
    directory: Path,
    record: Record,
    problems: list[str],
    shards: Sequence[Shard],
    damaged: list[str],
    progress: Progress,
) -> Verification:
    """Check the chain of steps and count the zeros of every layer; `problems` found before come first."""
    problems = [*problems, *damaged, *check_chain(record)]
    try:
        expected = _expectations(record)
    except BillhookError as error:
        return Verification(str(directory), len(record.steps), 0, 0, 0, [*problems, str(error)])
    unplaced = {} if damaged or all(located(e.facts) for e in expected) else _zeros_in_memory(directory)
    found, weights, counted = 0, 0, 0
    for layer in expected:
        parts = _zeros_on_disk(layer, shards) if located(layer.facts) else unplaced.get(layer.name)
        if parts is not None:
            problems += _check_layer(layer, parts)
            counted, found, weights = counted + 1, found + _count(parts), weights + layer.shape[0] * layer.shape[1]
        elif not damaged:
            problems.append(f"{layer.name}: its weights are not where {RECORD} says.")
        progress(layer.name)
    return Verification(str(directory), len(record.steps), counted, found, weights, problems)


def _check_finite(shards: Sequence[Shard]) -> list[str]:
    """The tensors with NaN or infinite values."""
    found = [entry.name for shard in shards for entry in shard.entries.values() if not shard.finite(entry)]
    return [f"{name} holds NaN or infinite values." for name in found]


@dataclass(frozen=True)
class _Planned:
    """The plan of one step for a layer: `zeros`, the `slack` by which a count may differ, and `groups`, (zeros, of) of
    N:M."""

    step: str
    zeros: int
    slack: float
    groups: tuple[int, int] | None


@dataclass(frozen=True)
class _Expected:
    """The entry of one layer in billhook.json, and its plans in the order of the steps."""

    name: str
    shape: tuple[int, int]
    facts: Mapping[str, Any]
    planned: list[_Planned] = field(default_factory=list)


def _expectations(record: Record) -> list[_Expected]:
    """The layers with their plans; raises BillhookError where plans and layers contradict each other."""
    layers = record.layers.items()
    expected = {name: _Expected(name, (facts["shape"][0], facts["shape"][1]), facts) for name, facts in layers}
    targets: dict[str, float] = {}
    reshaped = max((i for i, step in enumerate(record.steps) if step.step == "slim"), default=-1)
    for number, step in enumerate(record.steps):
        if step.plan is None or number <= reshaped:  # earlier plans were of layers of another shape
            continue
        plan = Plan.from_json(step.plan, f"{RECORD}, {step_name(number, step)}")
        # a training or another shape leaves layers that no plan names
        last = number == len(record.steps) - 1 and reshaped < 0 and all(step.step != "recover" for step in record.steps)
        named = [name for name in expected if name in plan.weights or (last and name not in targets)]
        shapes = {name: expected[name].shape for name in named}
        plan.check(shapes)
        for name, zeros in plan.zeros(shapes).items():
            planned = expected[name].planned
            if plan.weights[name].type is None:
                planned.append(_planned(plan, name, zeros, shapes[name], number, step))
                targets[name] = plan.sparsity[name]
            elif planned:  # a storage type asks for no number of zeros, and groups keep theirs
                planned.append(_Planned(step_name(number, step), 0, math.inf, planned[-1].groups))
    for name, layer in expected.items():
        target, noted = targets.get(name), layer.facts.get("sparsity")
        if noted != target and not _close(noted, target):
            raise BillhookError(f"{name}: the plan says sparsity {target}, the layer {noted}; one was edited.")
    return list(expected.values())


def _close(a: Any, b: Any) -> bool:
    """Whether two sparsities are equal within the tolerance of plans."""
    return isinstance(a, int | float) and isinstance(b, int | float) and abs(a - b) <= 1e-6


def _planned(plan: Plan, name: str, zeros: int, shape: tuple[int, int], number: int, step: Step) -> _Planned:
    out, columns = shape
    floor = step.made_by.get("published") or step.made_by.get("rounding") == "floor"  # until version 1
    # published counts are rounded down in each row, and weights equal to a published threshold are removed too
    slack = out + 0.01 * out * columns if floor else 1
    keep_of = plan.weights[name].keep_of
    groups = None if keep_of is None else (keep_of[1] - keep_of[0], keep_of[1])
    return _Planned(step_name(number, step), zeros, slack, groups)


def _open(directory: Path) -> tuple[list[Shard], list[str]]:
    """The weight files that can be read, and the faults of the others."""
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


def _zeros_on_disk(layer: _Expected, shards: Sequence[Shard]) -> list[np.ndarray] | None:
    try:
        if layer.facts.get("type"):
            return [compressed_tensors.zeros(layer.facts, layer.shape, shards)]
        return layer_zeros(layer.facts, layer.shape, shards)
    except (
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ValueError,
        RuntimeError,
    ):  # a place that was edited by hand
        return None


def _count(parts: list[np.ndarray]) -> int:
    return sum(int(part.sum()) for part in parts)


def _check_layer(layer: _Expected, parts: list[np.ndarray]) -> Iterator[str]:
    """Compare a layer's zeros with the recorded ones, with its last plan, and with earlier plans.

    More zeros than planned are valid where weights were zero before, and fewer than an earlier step planned where a
    later one changed them; the layer's notes say so.
    """
    count, recorded, notes = _count(parts), layer.facts["zeros"], layer.facts.get("notes", [])
    if count != recorded:
        yield f"{layer.name}: {count} zeros on disk, {recorded} recorded."
    if not layer.planned:
        return
    *earlier, plan = layer.planned
    refilled = any(note.endswith(REFILLED) for note in notes)
    for planned in earlier:
        if count < planned.zeros - planned.slack and not refilled:
            yield f"{layer.name}: {count} zeros on disk, {planned.zeros} planned in {planned.step}."
    if count < plan.zeros - plan.slack or (count > plan.zeros + plan.slack and not notes):
        yield f"{layer.name}: {count} zeros on disk, {plan.zeros} planned."
    if plan.groups is not None and not (refilled and plan.slack == math.inf):
        least, of = plan.groups
        short = sum(int((part.reshape(len(part), -1, of).sum(2) < least).sum()) for part in parts)
        if short:
            yield f"{layer.name}: {short} groups of {of} have fewer than {least} zeros."


def _zeros_in_memory(directory: Path) -> dict[str, list[np.ndarray]]:
    """The zeros of a model whose layers have no known place on disk, counted in the loaded model."""
    from billhook.architectures.layers import find_layers
    from billhook.tasks.opening import load_model

    layers = find_layers(load_model(directory), convolutions=True, outside=True)
    return {layer.name: [(layer.weight == 0).numpy()] for layer in layers}
