"""The one loop: visit a model block by block and change every layer as the plan says.

Blocks are visited in running order. Each layer's method sees the inputs that the blocks before it, already changed, now
produce, as in the published code of Wanda and SparseGPT; a criterion that asks for `drift` sees those that the changed
layers before it in the same block produce.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_layers
from billhook.distributed.collectives import broadcast_, gather, shard, world
from billhook.engine.batch import Batch
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Block, Progress, walk
from billhook.errors import BillhookError, JobError
from billhook.methods.encoded import Masked, count_zeros
from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.magnitude import magnitude
from billhook.methods.statistics import GRADIENTS, STATISTICS, LayerStats
from billhook.plan.plan import Plan

Group = Literal["row", "layer"]
Rounding = Literal["exact", "floor"]
_ROWS = 256  # of a weight whose error is computed at once


@dataclass(frozen=True)
class Method:
    """The criterion with its options, complete; `group` overrides its comparison group, `rounding` how zeros are
    counted."""

    criterion: str
    options: Mapping[str, Any]
    group: Group | None = None
    rounding: Rounding = "exact"

    @property
    def needs(self) -> tuple[str, ...]:
        """All statistics that the criterion reads."""
        return CRITERIA.needs(self.criterion, self.options)

    @property
    def observed(self) -> tuple[str, ...]:
        """Those that are statistics of a layer's inputs."""
        return tuple(name for name in self.needs if name in STATISTICS)

    @property
    def gradient(self) -> str:
        """The statistic of gradients that the criterion reads, or an empty string."""
        return next((name for name in self.needs if name in GRADIENTS), "")


@dataclass(frozen=True)
class LayerResult:
    """What was done to one layer: planned sparsity, zeros before and after, notes of the method, and the error.

    `error` is the squared change of the layer's output relative to its square, for uncorrelated inputs of the size that
    they have on the calibration samples (all of size one without samples); None where that is not a number. `seconds`
    is the time it took.
    """

    layer: str
    shape: tuple[int, int]
    planned: float
    zeros: int
    zeros_before: int
    notes: tuple[str, ...]
    error: float | None = None
    seconds: float = 0.0

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """Fraction of the weights that are zero now."""
        return self.zeros / self.n


class Tuner(Protocol):
    """Tunes what is left of a block (`billhook.recover.blockwise`)."""

    wants_dense_outputs: bool

    def note(self, block: Block) -> None:
        """Called while the block is still dense."""
        ...

    def tune_(self, block: Block) -> str:
        """Called once the block is pruned; returns a note for the report."""
        ...


@torch.no_grad()
def apply_plan_(
    model: PreTrainedModel,
    plan: Plan,
    method: Method,
    batches: Sequence[Batch] = (),
    *,
    layers: Sequence[Layer] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    tuner: Tuner | None = None,
    resources: Resources = IN_MEMORY,
    start: int = 0,
    progress: Progress = lambda layer: None,
    finished: Callable[[Block, list[LayerResult]], None] = lambda block, results: None,
) -> list[LayerResult]:
    """Change the layers of a model in place as `plan` says.

    `batches` are the calibration samples, needed where the method observes inputs or a tuner works; `layers` are the
    layers the plan is for (all prunable ones by default); `gradients` [out, in] by layer name are those the criterion
    reads; `start` is the first block to change, those before it being done already; `finished` is called after each
    block. Raises BillhookError before anything changes if the plan does not fit, JobError if the result is not what was
    planned or activations are not finite.
    """
    layers = find_layers(model) if layers is None else layers
    shapes = {layer.name: layer.shape for layer in layers}
    plan.check_sparsities()
    plan.check(shapes)
    if method.gradient and gradients is None:
        raise BillhookError(
            f"The criterion {method.criterion} reads gradients ({method.gradient}), and none are given."
        )
    pruning = _Pruning(plan, plan.zeros(shapes), method, gradients, progress)
    results: list[LayerResult] = []
    observes = method.observed or tuner
    blocks = walk(
        model,
        batches if observes else (),
        method.observed,
        dense_outputs=tuner is not None and tuner.wants_dense_outputs,
        start=start,
        resources=resources,
    )
    for block in blocks:
        block = replace(block, layers=[layer for layer in block.layers if layer.name in shapes])
        if tuner is not None and block.layers:
            tuner.note(block)
        done = [result for stage in block.stages for result in pruning.stage(stage)]
        if tuner is not None and block.layers:
            with resources.block(block.index + 1 if block.following.module else block.index):
                done = _tuned(tuner.tune_(block), block, done)
        finished(block, done)
        results += done
    return results


@dataclass(frozen=True)
class _Pruning:
    """What all layers of a run have in common."""

    plan: Plan
    zeros: Mapping[str, int]
    method: Method
    gradients: Mapping[str, Tensor] | None
    progress: Progress

    def stage(self, stage: tuple[Sequence[Layer], Mapping[str, LayerStats]]) -> list[LayerResult]:
        """Prune the layers of one stage of a block, those of the plan; the processes of a run share them."""
        chosen = [layer for layer in stage[0] if layer.name in self.zeros]
        made = []
        for layer in shard(chosen):
            made.append(self.layer(layer, stage[1].get(layer.name, LayerStats(0, 0))))
            self.progress(layer.name)
        for number, layer in enumerate(chosen):
            broadcast_(layer.weight, number % world())
        results = {result.layer: result for part in gather(made) for result in part}
        return [results[layer.name] for layer in chosen]

    def layer(self, layer: Layer, stats: LayerStats) -> LayerResult:
        """Prune one layer in place, and check that what was planned is what was done."""
        begun, weight, select = time.perf_counter(), layer.weight, self._select(layer)
        before = count_zeros(weight)
        if self.gradients is not None:
            stats = replace(stats, gradient=self.gradients[layer.name].to(weight.device))
        criterion, options = CRITERIA.get(self.method.criterion), dict(self.method.options)
        if unseen := self._unseen(stats):
            criterion, options = magnitude, {}
            stats = LayerStats(0, 0, notes=[f"{unseen}: pruned by magnitude"])
        try:
            if select.sparsity > 0:
                squares = _input_squares(stats, weight)  # before the criterion, which may overwrite the Gram matrix
                encoded = Masked(criterion(weight.float(), stats, select, **options), select, before)
                error = _relative_error(weight, encoded.values, squares)
                weight.copy_(encoded.decode(weight.dtype))
            else:
                encoded, error = Masked(weight, select, before), 0.0
            notes = encoded.check(weight)
        except BillhookError as problem:
            raise type(problem)(f"{layer.name}: {problem}") from None
        took = time.perf_counter() - begun
        noted = (*stats.notes, *notes)
        return LayerResult(layer.name, layer.shape, select.sparsity, count_zeros(weight), before, noted, error, took)

    def _select(self, layer: Layer) -> Select:
        spec = self.plan.weights[layer.name]
        group = self.method.group or CRITERIA.group(self.method.criterion)
        zeros = self.zeros[layer.name]
        return Select(layer.shape, spec.sparsity, zeros, spec.keep_of, group, self.method.rounding)

    def _unseen(self, stats: LayerStats) -> str | None:
        """Why the samples say nothing about a layer (an expert that received no token), or None."""
        if self.method.observed:
            return "received no calibration token" if stats.tokens == 0 else None
        return "has no gradient" if stats.gradient is not None and not stats.gradient.any() else None


def _tuned(note: str, block: Block, done: Sequence[LayerResult]) -> list[LayerResult]:
    """The results of a tuned block, with zeros counted again and, at its first layer, the tuner's note."""
    weights = {layer.name: layer.weight for layer in block.layers}
    results = []
    for result in done:
        zeros = count_zeros(weights[result.layer])
        if zeros < result.zeros:
            raise JobError(
                f"{result.layer}: tuning brought {result.zeros - zeros} removed weights back. The result is not saved."
            )
        results.append(replace(result, zeros=zeros, notes=(*result.notes, *([note] if result is done[0] else []))))
    return results


def _relative_error(old: Tensor, new: Tensor, squares: Tensor) -> float | None:
    """The error of a `LayerResult`, some rows at a time, so that it needs no memory."""
    change = total = 0.0
    for before, after in zip(old.split(_ROWS), new.split(_ROWS), strict=True):
        change += float(((after - before).square() @ squares).sum(dtype=torch.float64))
        total += float((before.float().square() @ squares).sum(dtype=torch.float64))
    return change / total if total > 0 and math.isfinite(change / total) else None


def _input_squares(stats: LayerStats, weight: Tensor) -> Tensor:
    """The squared norm of each input over the samples, float32 [in]; ones where inputs were not observed."""
    if stats.gram is not None:
        return stats.gram.diagonal().float().clone()
    if stats.input_norm is None:
        return torch.ones(weight.shape[1], device=weight.device)
    return stats.input_norm.float().square()
