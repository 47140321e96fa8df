"""The loop that applies a plan: visit a model block by block and change every layer as planned.

Blocks are visited in running order. The inputs of a layer are those that the earlier blocks, already changed, produce,
as in the published code of Wanda and SparseGPT; with the prefix `dense`, as in that for image classifiers, they are
those of the dense model. For a criterion that reads `drift`, the earlier layers of the same block are changed as well.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_layers, with_linear
from billhook.distributed.collectives import broadcast_, gather, shard, world
from billhook.engine.batch import Batch
from billhook.engine.capture import not_run
from billhook.engine.method import WeightMethod
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Block, Progress, walk
from billhook.errors import BillhookError, JobError
from billhook.methods.encoded import Encoded, count_zeros
from billhook.methods.statistics import LayerStats
from billhook.plan.plan import Plan
from billhook.store.tensor_bytes import same_where_kept

_ROWS = 256  # rows of a weight whose error is computed at once


@dataclass(frozen=True)
class LayerResult:
    """The result for one layer: planned sparsity or storage type, zeros now and before, notes, and the error.

    `error` is the squared change of the layer's output relative to its square, for uncorrelated inputs with the norms
    of the calibration samples (norm 1 without samples); None where that is not a number. `updated` says whether the
    criterion or the tuning gave kept weights new values. `kept` are the numbers of the parts of a unit that stayed,
    where parts were removed whole. `refilled` counts the weights that were zero and have values in the storage type.
    """

    layer: str
    shape: tuple[int, int]
    planned: float
    zeros: int
    zeros_before: int
    notes: tuple[str, ...]
    error: float | None = None
    seconds: float = 0.0
    type: str | None = None
    updated: bool = False
    kept: list[int] | None = None
    refilled: int = 0

    @property
    def n(self) -> int:
        """The number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that are zero now."""
        return self.zeros / self.n


class Tuner(Protocol):
    """Tunes what a block has left, such as its kept weights (`billhook.recovery.blockwise`)."""

    wants_dense_outputs: bool

    def note(self, block: Block) -> None:
        """Called while the block is still dense."""

    def tune_(self, block: Block) -> str:
        """Called when the block is pruned; returns a note for the report."""
        ...


@torch.no_grad()
def apply_plan_(
    model: PreTrainedModel,
    plan: Plan,
    method: WeightMethod,
    batches: Sequence[Batch] = (),
    *,
    layers: Sequence[Layer] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    known: Mapping[str, LayerStats] | None = None,
    tuner: Tuner | None = None,
    resources: Resources = IN_MEMORY,
    start: int = 0,
    progress: Progress = lambda layer: None,
    made: Callable[[Layer, Encoded], None] = lambda layer, encoded: None,
    finished: Callable[[Block, list[LayerResult]], None] = lambda block, results: None,
) -> list[LayerResult]:
    """Change the layers of a model in place as planned.

    `batches` are the calibration samples, needed for statistics of inputs and for a tuner. `layers` are those of the
    plan (all prunable ones by default). `gradients` [out, in] by layer name are read by the criterion; where statistics
    are `known`, by layer name, no inputs are observed. Blocks before `start` are done already. `made` is called with
    each encoded weight (in the process that made it), `finished` after each block. Raises BillhookError, with nothing
    changed, if the plan does not fit; JobError if the result is not as planned or activations are not finite.
    """
    layers = find_layers(model) if layers is None else layers
    shapes = {layer.name: layer.shape for layer in layers}
    method.check(plan)
    plan.check(shapes)
    if method.gradient and gradients is None:
        raise BillhookError(f"The criterion {method.name} reads gradients ({method.gradient}); none are given.")
    pruning = _Applying(plan, plan.zeros(shapes), method, gradients, known or {}, progress, made)
    observed = method.observed if known is None else ()
    results: list[LayerResult] = []
    samples = batches if observed or tuner else ()
    dense = tuner is not None and tuner.wants_dense_outputs
    blocks = walk(
        model, samples, observed, layers=with_linear(model, layers), read_only=method.prefix == "dense",
        dense_outputs=dense, start=start, resources=resources,
    )  # fmt: skip
    for block in blocks:
        block = replace(block, layers=[layer for layer in block.layers if layer.name in shapes])
        empty: dict[str, Tensor] = {}
        if samples and not block.calls and any(layer.name in plan.weights for layer in block.layers):
            raise not_run(block.name)
        if tuner is not None and block.layers:
            tuner.note(block)
            typed = [x for x in block.layers if x.name in plan.weights and plan.weights[x.name].type is not None]
            empty = {layer.name: layer.weight == 0 for layer in typed}
        done = [result for stage in block.stages for result in pruning.stage(stage)]
        if tuner is not None and block.layers:
            with resources.block(block.index if block.last else block.index + 1):
                done = tuned_results(tuner.tune_(block), block, done, empty)
        finished(block, done)
        results += done
    return results


@dataclass(frozen=True)
class _Applying:
    """What is common to all layers of a run."""

    plan: Plan
    zeros: Mapping[str, int]
    method: WeightMethod
    gradients: Mapping[str, Tensor] | None
    known: Mapping[str, LayerStats]
    progress: Progress
    made: Callable[[Layer, Encoded], None]

    def stage(self, stage: tuple[Sequence[Layer], Mapping[str, LayerStats]]) -> list[LayerResult]:
        """Change the planned layers of one stage of a block, sharded over the processes of a run."""
        chosen = [layer for layer in stage[0] if layer.name in self.zeros]
        made = []
        for layer in shard(chosen):
            unseen = self.known.get(layer.name, LayerStats(0, 0))
            made.append(self.layer(layer, stage[1].get(layer.name, unseen)))
            self.progress(layer.name)
        for number, layer in enumerate(chosen):
            broadcast_(layer.weight, number % world())
        results = {result.layer: result for part in gather(made) for result in part}
        return [results[layer.name] for layer in chosen]

    def layer(self, layer: Layer, stats: LayerStats) -> LayerResult:
        """Change one layer in place, and check the result against the plan."""
        begun, weight, spec = time.perf_counter(), layer.weight, self.plan.weights[layer.name]
        before = count_zeros(weight)
        if self.gradients is not None:
            stats = replace(stats, gradient=self.gradients[layer.name].to(weight.device))
        try:
            squares = _input_squares(stats, weight)  # before the method, which may overwrite the Gram matrix
            encoded = self.method.encode(weight, stats, spec, self.zeros[layer.name])
            new = encoded.decode(torch.float32)
            error, updated = _relative_error(weight, new, squares), bool(((new != 0) & (new != weight)).any())
            refilled = 0 if spec.type is None else int(((weight == 0) & (new != 0)).sum())
            notes = [] if spec.type is None else _too_small(weight, new, spec.type)
            weight.copy_(same_where_kept(new, weight))
            notes += encoded.check(weight)
        except BillhookError as problem:
            raise type(problem)(f"{layer.name}: {problem}") from None
        self.made(layer, encoded)
        took = time.perf_counter() - begun
        return LayerResult(
            layer.name, layer.shape, planned=spec.sparsity, zeros=count_zeros(weight), zeros_before=before,
            notes=(*stats.notes, *notes), error=error, seconds=took, type=spec.type, updated=updated, refilled=refilled,
        )  # fmt: skip


def _too_small(old: Tensor, new: Tensor, type: str) -> list[str]:
    """A note where rows of a weight became zero as a whole, which happens where a scale cannot be stored."""
    gone = int(((old != 0).any(1) & (new == 0).all(1)).sum())
    what = f"{gone} rows became zero, as their scales are too small for {type}: --ignore leaves the layer out"
    return [what] if gone else []


def tuned_results(
    note: str, block: Block, done: Sequence[LayerResult], empty: Mapping[str, Tensor]
) -> list[LayerResult]:
    """The results of a tuned block, with zeros counted again and the tuner's note at the first layer.

    `empty` says which weights of quantized layers were zero, bool [out, in]: a minimum that moves fills them.
    Raises JobError where removed weights came back; where weights are quantized, the tuner itself checks its codes.
    """
    weights = {layer.name: layer.weight for layer in block.layers}
    results = []
    for result in done:
        name = result.layer
        zeros = count_zeros(weights[name])
        if zeros < result.zeros and result.type is None:
            back = f"tuning made {result.zeros - zeros} removed weights nonzero"
            raise JobError(f"{name}: {back}. The result is not saved.")
        refilled = int((empty[name] & (weights[name] != 0)).sum()) if name in empty else 0
        notes = (*result.notes, note) if result is done[0] else result.notes
        results.append(replace(result, zeros=zeros, notes=notes, updated=True, refilled=refilled))
    return results


def _relative_error(old: Tensor, new: Tensor, squares: Tensor) -> float | None:
    """The error of a `LayerResult`, `_ROWS` rows at a time to save memory."""
    change = total = 0.0
    for before, after in zip(old.split(_ROWS), new.split(_ROWS), strict=True):
        change += float(((after - before.float()).square() @ squares).sum(dtype=torch.float64))
        total += float((before.float().square() @ squares).sum(dtype=torch.float64))
    return change / total if total > 0 and math.isfinite(change / total) else None


def _input_squares(stats: LayerStats, weight: Tensor) -> Tensor:
    """The squared norm of each input over the samples, float32 [in]; ones where inputs were not observed."""
    if stats.gram is not None:
        return stats.gram.diagonal().float().clone()
    if stats.input_norm is None:
        return torch.ones(weight.shape[1], device=weight.device)
    return stats.input_norm.float().square()
