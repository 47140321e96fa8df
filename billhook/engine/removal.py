"""The loop that removes parts of units: visit a model block by block and choose in each unit what stays.

The model keeps its shapes: a removed part has zeros in the columns of its consumer, which makes no difference to what
the model computes. Blocks that are dropped pass their input on. For a method that reads `drift`, the dense model's
hidden states pass through every block as it was, the dropped ones too, so that what follows can make up for them.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import Unit
from billhook.distributed.collectives import broadcast_, shard, unshard, world
from billhook.engine.batch import Batch
from billhook.engine.capture import Extra, Forward, extra_of, returned, stubbed
from billhook.engine.experts import choose_experts, down_projections
from billhook.engine.loop import LayerResult
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.routing import restrict_
from billhook.engine.streaming import Stream
from billhook.engine.walk import Block, Progress, walk
from billhook.errors import BillhookError, JobError
from billhook.methods.encoded import count_zeros
from billhook.methods.statistics import GRADIENTS, STATISTICS, LayerStats
from billhook.methods.structured import STRUCTURED
from billhook.methods.structured.magnitude import magnitude


@dataclass(frozen=True)
class Removal:
    """A structured method with all its options."""

    method: str
    options: Mapping[str, Any]

    @property
    def observed(self) -> tuple[str, ...]:
        """The statistics of a consumer's inputs that it reads."""
        return tuple(name for name in STRUCTURED.needs(self.method, self.options) if name in STATISTICS)

    @property
    def drifts(self) -> bool:
        """Whether it follows the dense model's outputs."""
        return "drift" in self.observed

    def without_target(self) -> "Removal":
        """The same for a model whose tokens go to other experts than in the dense model."""
        return replace(self, options={**self.options, "dense_target": 0.0}) if self.drifts else self

    @property
    def gradient(self) -> str:
        """The statistic of gradients that it reads, or an empty string."""
        return next((name for name in STRUCTURED.needs(self.method, self.options) if name in GRADIENTS), "")

    def choose(self, weight: Tensor, stats: LayerStats, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Which parts stay, bool [parts], and the new weight [out, in]; by magnitude for an expert without a token."""
        function = partial(STRUCTURED.get(self.method), **self.options)
        if self.observed and stats.tokens == 0:
            stats.note("received no calibration token: chosen by magnitude")
            function = partial(magnitude)
        keep: Tensor
        keep, new = function(weight.float(), stats, groups.to(weight.device), count)
        return keep, new


class Dropped:
    """The forward function of a dropped block: the hidden states as they are, in the form that the block returns.

    While it is not `active`, and for the source's own weights, the block itself runs.
    """

    def __init__(self, forward: Forward, stream: Stream | None) -> None:
        self.forward, self.stream, self.active = forward, stream, True
        self._extra: list[Extra] = []  # of the block, once it has run

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the block returns."""
        if not self.active or (self.stream is not None and self.stream.of_source):
            return self.forward(hidden_states, *args, **kwargs)
        if not self._extra:
            self._extra.append(extra_of(self.forward(hidden_states, *args, **kwargs)))
        return returned(self._extra[0], hidden_states)


@contextmanager
def dropping(
    model: PreTrainedModel, indices: Sequence[int], resources: Resources = IN_MEMORY
) -> Iterator[dict[int, Dropped]]:
    """Drop blocks of a model for a `with` block; yields their forward functions by index."""
    blocks, made = list(blocks_of(model).items()), dict[int, Dropped]()

    def drop(number: int, forward: Forward) -> Dropped:
        dropped = Dropped(forward, resources.stream)
        made[indices[number]] = dropped
        return dropped

    with stubbed(dict(blocks[index] for index in indices), drop):
        yield made


@torch.no_grad()
def remove_parts_(
    model: PreTrainedModel,
    units: Sequence[Unit],
    counts: Mapping[str, int],
    removal: Removal,
    batches: Sequence[Batch] = (),
    *,
    experts: str = "obs",
    dropped: Mapping[int, Dropped] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    resources: Resources = IN_MEMORY,
    start: int = 0,
    progress: Progress = lambda unit: None,
    finished: Callable[[Block, list[LayerResult]], None] = lambda block, results: None,
) -> list[LayerResult]:
    """Remove parts of units in place; `counts` parts stay, by unit. `experts` is the method for experts.

    The layers of a stage are sharded over the processes of a run. `dropped` are the blocks of `dropping`, which become
    active when they are reached. Blocks before `start` are done already. Raises JobError if a new weight is not finite.
    """
    known = {unit.consumer.name: unit for unit in units if unit.consumer is not None}
    layers = [unit.consumer for unit in known.values() if unit.consumer is not None]
    drop, results = dict(dropped or {}), list[LayerResult]()
    for index, forward in drop.items():
        forward.active = index < start
    statistics = removal.observed if layers else ()
    for block in walk(model, batches, statistics, layers=layers, start=start, resources=resources):
        done = []
        for unit in (u for u in units if u.kind == "experts" and u.block == block.index):
            done.append(remove_experts_(model, unit, counts[unit.name], experts, block))
            progress(unit.name)
        for names, stats in block.stages:
            stage, made = [layer for layer in names if block.index not in drop], list[LayerResult]()
            for layer in shard(stage):
                given = stats.get(layer.name, LayerStats(0, 0))
                gradient = None if gradients is None else gradients[layer.name]
                unit = known[layer.name]
                made.append(remove_from_(unit, counts[unit.name], removal, given, gradient))
                progress(unit.name)
            for number, layer in enumerate(stage):
                broadcast_(layer.weight, number % world())
            done += unshard(made)
        if block.index in drop:
            drop[block.index].active = True
        finished(block, done)
        results += done
    return results


def remove_experts_(model: PreTrainedModel, unit: Unit, count: int, method: str, block: Block) -> LayerResult:
    """Choose the experts of a mixture that stay; from now on its router knows no others."""
    begun = time.perf_counter()
    choice = choose_experts(model, unit, count, method, block)
    for layer in down_projections(model, unit):
        if layer.name in choice.weights:
            layer.weight.copy_(choice.weights[layer.name])
    restrict_(model, unit, choice.keep)
    notes = (f"{choice.unseen} experts received no calibration token; they went first",) if choice.unseen else ()
    took, kept = time.perf_counter() - begun, choice.keep.nonzero()[:, 0].tolist()
    return LayerResult(
        unit.name, (unit.count, 1), planned=1 - count / unit.count, zeros=0, zeros_before=0, notes=notes,
        error=choice.error, seconds=took, updated=bool(choice.weights), kept=kept,
    )  # fmt: skip


def changed_layers(model: PreTrainedModel, units: Sequence[Unit]) -> list[Layer]:
    """The layers whose weights may change where parts of units are removed."""
    layers = [unit.consumer for unit in units if unit.consumer is not None]
    down = [layer for unit in units if unit.kind == "experts" for layer in down_projections(model, unit)]
    known = {layer.name for layer in layers}
    return layers + [layer for layer in down if layer.name not in known]


def remove_from_(
    unit: Unit, count: int, removal: Removal, stats: LayerStats, gradient: Tensor | None = None
) -> LayerResult:
    """Remove parts of one unit in place, so that `count` stay; raises JobError if the new weight is not finite."""
    layer, begun = unit.consumer, time.perf_counter()
    assert layer is not None
    keep, new, error = choose_parts(unit, count, removal, stats, gradient)
    layer.weight.copy_(new)
    took, kept = time.perf_counter() - begun, keep.nonzero()[:, 0].tolist()
    return LayerResult(
        layer.name, layer.shape, planned=1 - count / unit.count, zeros=count_zeros(layer.weight), zeros_before=0,
        notes=tuple(stats.notes), error=error, seconds=took, updated=True, kept=kept,
    )  # fmt: skip


def choose_parts(
    unit: Unit, count: int, removal: Removal, stats: LayerStats, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor, float | None]:
    """Which parts of a unit stay, bool [parts], its consumer's new weight [out, in], and the relative squared error.

    `gradient` [out, in] is that of the consumer, for a method that reads it. Raises JobError if the new weight is not
    finite.
    """
    assert unit.consumer is not None
    assert unit.groups is not None
    layer, gram = unit.consumer, None if stats.gram is None else stats.gram.clone()
    stats = stats if gradient is None else replace(stats, gradient=gradient)
    weight = layer.weight
    try:
        keep, new = removal.choose(weight, stats, unit.groups, count)
    except BillhookError as problem:
        raise type(problem)(f"{layer.name}: {problem}") from None
    if not torch.isfinite(new).all():
        raise JobError(f"{layer.name}: the new weights are not finite: use more damping (--set damping=0.1).")
    return keep, new, _error(weight.float(), new, gram, stats)


def _error(old: Tensor, new: Tensor, gram: Tensor | None, stats: LayerStats) -> float | None:
    """The squared change of the layer's output on the calibration samples, relative to its square."""
    D = old - new
    if gram is not None:
        change, total = float(((D @ gram) * D).sum()), float(((old @ gram) * old).sum())
    else:
        squares = torch.ones(old.shape[1]) if stats.input_norm is None else stats.input_norm.square()
        change, total = (float((x.square() @ squares.to(x.device)).sum()) for x in (D, old))
    return change / total if total > 0 else None
