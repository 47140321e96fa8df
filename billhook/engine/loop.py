"""Pruning a model in memory by a plan: the one loop in which weights are removed.

Blocks are visited in depth order; each layer's criterion sees the inputs that the already pruned blocks before it
produce, as in the published code of Wanda and SparseGPT. A criterion that asks for `drift` sees those that the pruned
layers before it produce.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, find_layers
from billhook.distributed.collectives import broadcast_, check_share, gather, shard, world
from billhook.engine.activation_store import SPILL_GIB
from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.streaming import resident
from billhook.engine.walk import Block, Progress, calls_of_one, walk
from billhook.errors import BillhookError, JobError
from billhook.evaluation.perplexity import vocabulary_size
from billhook.methods.masks import Select
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.magnitude import magnitude
from billhook.methods.statistics import GRADIENTS, STATISTICS, LayerStats
from billhook.plan.plan import Plan
from billhook.recover.blockwise import BlockTuner, Refine
from billhook.text.windows import as_batches

Group = Literal["row", "layer"]
Rounding = Literal["exact", "floor"]
_ROWS = 256


@dataclass(frozen=True)
class LayerResult:
    """What was done to one layer: planned sparsity, zeros before and after, what the criterion had to say, and what was
    lost.

    `error` is the squared change of the layer's output as a share of its square, inputs taken as uncorrelated and as
    large as the calibration text has them, or all as one where there was no text; None where that is not a number.
    `seconds` is how long it took.
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


def prune_(
    model: PreTrainedModel,
    plan: Plan,
    *,
    criterion: str = "wanda",
    batches: Tensor | Sequence[Tensor] = (),
    layers: Sequence[Layer] | None = None,
    group: Group | None = None,
    rounding: Rounding = "exact",
    gradients: Gradients | None = None,
    progress: Progress = lambda layer: None,
    start: int = 0,
    finished: Callable[[Block, list[LayerResult]], None] = lambda block, results: None,
    spill_gib: float = SPILL_GIB,
    refine: Refine | None = None,
    **options: Any,
) -> list[LayerResult]:
    """Remove weights in place as `plan` says.

    `batches` are token ids [batch, length] int64 (one tensor: one batch), needed by every criterion but magnitude;
    `layers` are the layers the plan is for (all prunable ones by default); `group` overrides the criterion's comparison
    group; `gradients` are those of the dense model for a criterion that reads them (computed first if not given);
    `start` is the first block to prune, those before it being pruned already; `finished` is called after each block;
    `refine` tunes what is left of each block once it is pruned; `options` are the criterion's own. Raises BillhookError
    before anything changes if plan, criterion, gradients or options do not fit, JobError if the zeros made are not the
    zeros planned or activations are not finite.
    """
    layers = find_layers(model) if layers is None else layers
    shapes = {layer.name: layer.shape for layer in layers}
    configured = CRITERIA.configure(criterion, options)
    needs = CRITERIA.needs(criterion, configured)
    observed = tuple(name for name in needs if name in STATISTICS)
    gradient = next((name for name in needs if name in GRADIENTS), None)
    plan.check_sparsities("prune_")
    plan.check(shapes)
    reads_text = observed or (gradient and gradients is None) or refine
    batches = _checked(model, batches, "--refine" if refine else f"The criterion {criterion}") if reads_text else []
    tuner = None if refine is None else BlockTuner(refine, calls_of_one(model, batches), spill_gib)
    zeros: dict[str, int] = plan.zeros(shapes)
    results: list[LayerResult] = []
    with _open_gradients(model, batches, gradient, gradients, layers, progress) as found:
        dense_outputs = refine is not None and refine.dense_target > 0
        for block in walk(
            model,
            batches if observed or refine else (),
            observed,
            dense_outputs=dense_outputs,
            start=start,
            spill_gib=spill_gib,
        ):
            done: list[LayerResult] = []
            block = replace(block, layers=[layer for layer in block.layers if layer.name in shapes])
            if tuner is not None and block.layers:
                tuner.note(block)
            for stage, known in block.stages:
                chosen = [layer for layer in stage if layer.name in shapes]
                made = []
                for layer in shard(chosen):
                    stats = known.get(layer.name, LayerStats(0, 0))
                    stats = (
                        stats if found is None else replace(stats, gradient=found[layer.name].to(layer.weight.device))
                    )
                    select = _select(plan, layer, zeros[layer.name], group or CRITERIA.group(criterion), rounding)
                    function = CRITERIA.get(criterion)
                    if unseen := _unseen(stats, observed):
                        function, stats = magnitude, LayerStats(0, 0, notes=[f"{unseen}: pruned by magnitude"])
                    made.append(
                        _prune_layer(layer, stats, select, function, {} if function is magnitude else configured)
                    )
                    progress(layer.name)
                done += _exchange(chosen, made)
            if tuner is not None and block.layers:
                with resident(model, block.index + 1) if block.after.module else nullcontext():
                    done = _refine(tuner, block, done)
            finished(block, done)
            results += done
    return results


def _checked(model: PreTrainedModel, batches: Tensor | Sequence[Tensor], who: str) -> list[Tensor]:
    """The batches as a list; raises BillhookError where there is none, or not one for every process."""
    found = as_batches(batches, vocabulary_size(model))
    if not found:
        raise BillhookError(f"{who} looks at activations: give text with --calibration SOURCE.")
    check_share(len(found))
    return found


def _refine(tuner: BlockTuner, block: Block, done: Sequence[LayerResult]) -> list[LayerResult]:
    """Tune a pruned block in place; the results with zeros counted again and, at its first layer, what became of the
    loss."""
    refined = tuner.refine_(block)
    weights = {layer.name: layer.weight for layer in block.layers}
    results = []
    for result in done:
        zeros = int((weights[result.layer] == 0).sum())
        if zeros < result.zeros:
            raise JobError(
                f"{result.layer}: tuning brought {result.zeros - zeros} removed weights back. The result is not saved."
            )
        results.append(replace(result, zeros=zeros, notes=(*result.notes, *([refined] if result is done[0] else []))))
    return results


def _exchange(layers: Sequence[Layer], done: list[LayerResult]) -> list[LayerResult]:
    """Give each process of a run the layers that the others pruned; returns the results of all."""
    for number, layer in enumerate(layers):
        broadcast_(layer.weight, number % world())
    results = {result.layer: result for part in gather(done) for result in part}
    return [results[layer.name] for layer in layers]


def _unseen(stats: LayerStats, observed: Sequence[str]) -> str | None:
    """Why the calibration text says nothing about a layer (an expert that no token was sent to), or None."""
    if observed:
        return "received no calibration token" if stats.tokens == 0 else None
    return "has no gradient" if stats.gradient is not None and not stats.gradient.any() else None


@contextmanager
def _open_gradients(
    model: PreTrainedModel,
    batches: Sequence[Tensor],
    statistic: str | None,
    given: Gradients | None,
    layers: Sequence[Layer],
    progress: Progress,
) -> Iterator[Gradients | None]:
    """The gradients a criterion reads: those given, once checked, or new ones in a temporary file; None if it reads
    none."""
    if statistic is None or given is not None:
        if statistic is not None and given is not None:
            given.check(statistic, {layer.name: layer.shape for layer in layers})
        yield given if statistic is not None else None
        return
    with tempfile.TemporaryDirectory(prefix="billhook.") as folder:
        path = Path(folder) / "gradients.safetensors"
        yield compute_gradients(model, batches, statistic, path, layers=layers, progress=progress)


def _select(plan: Plan, layer: Layer, zeros: int, group: Group, rounding: Rounding) -> Select:
    spec = plan.weights[layer.name]
    return Select(layer.shape, spec.sparsity, zeros, spec.keep_of, group, rounding)


def _prune_layer(
    layer: Layer, stats: LayerStats, select: Select, criterion: Callable[..., Tensor], options: dict[str, Any]
) -> LayerResult:
    """Apply the criterion to one layer and check that it removed what was planned."""
    begun, weight = time.perf_counter(), layer.weight
    before, lost = _zeros(weight), None
    if select.sparsity > 0:
        squares = _input_squares(stats, weight)
        try:
            new = criterion(weight.float(), stats, select, **options)
        except BillhookError as error:
            raise type(error)(f"{layer.name}: {error}") from None
        if not torch.isfinite(new.sum()) and not torch.isfinite(new).all():  # the sum is a fast way to see that all are
            raise JobError(
                f"{layer.name}: the new weights are not finite. Use another criterion for it, or leave it out "
                "with --ignore."
            )
        lost = _lost(weight, new, squares)
        weight.copy_(new)
    zeros = _zeros(weight)
    notes = [*stats.notes, *_check_count(layer.name, select, zeros, before)]
    took = time.perf_counter() - begun
    return LayerResult(
        layer.name,
        layer.shape,
        select.sparsity,
        zeros,
        before,
        tuple(notes),
        0.0 if select.sparsity == 0 else lost,
        took,
    )


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


def _lost(old: Tensor, new: Tensor, squares: Tensor) -> float | None:
    """The error of a `LayerResult`, some rows at a time, so that it takes no memory."""
    change = total = 0.0
    for before, after in zip(old.split(_ROWS), new.split(_ROWS), strict=True):
        change += float(((after - before).square() @ squares).sum(dtype=torch.float64))
        total += float((before.float().square() @ squares).sum(dtype=torch.float64))
    return change / total if total > 0 and math.isfinite(change / total) else None


def _input_squares(stats: LayerStats, weight: Tensor) -> Tensor:
    """The squared norm of each input over the calibration text, float32 [in]; ones where it was not looked at."""
    if stats.gram is not None:
        return stats.gram.diagonal().float().clone()
    return (
        torch.ones(weight.shape[1], device=weight.device)
        if stats.input_norm is None
        else stats.input_norm.float().square()
    )


def _check_count(name: str, select: Select, zeros: int, before: int) -> list[str]:
    """Compare zeros made with zeros planned. More are possible where kept weights were zero before, or became it in
    float16."""
    if select.rounding == "floor" and select.keep_of is None:
        return []  # the published counts are not the plan's
    planned = select.zeros
    if zeros < planned:
        raise JobError(f"{name}: {zeros} weights are zero where the plan asks for {planned}. The result is not saved.")
    return [f"{zeros - planned} more zeros than planned ({before} weights were zero before)"] if zeros > planned else []
