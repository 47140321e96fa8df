"""Estimate the time of a pruning job by running a part of it: the first blocks, with a few calibration windows.

The job's own loop runs on the first block with one layer of each shape, and on the first two blocks; the difference is
the time of one more block. These times are scaled by the numbers of windows, layers and blocks. No output is written,
and the weights are restored.
"""

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace

from billhook.architectures.layers import Layer, find_layers
from billhook.architectures.stacks import blocks_of, first_blocks, has_one_stack
from billhook.distributed.collectives import gather, world
from billhook.engine.batch import Batch, rows_of, select_rows
from billhook.engine.method import Method
from billhook.plan.allocators import allocate
from billhook.plan.table import Row, Table
from billhook.recovery.blockwise import LEAST, Refine
from billhook.steps.apply import prune_with
from billhook.steps.estimate import Estimate, estimate, n_bytes
from billhook.steps.resolve import ResolvedRequest
from billhook.store.tensor_bytes import tensor_bytes

SAMPLE = 1.0  # seconds of forward passes through a block that are enough for a measurement
FILES = 3  # times that a block is read, written or hashed in a run, each counted as one checksum
Shape = tuple[int, int]


def estimate_time(resolved: ResolvedRequest) -> Estimate:
    """`estimate`, with the time of pruning and writing measured on a part of the job; not that of making the plan.

    The time of refining counts all epochs, although most blocks need fewer. For a model with several stacks, no time is
    measured.
    """
    if not has_one_stack(resolved.opened.model):
        return estimate(resolved)
    opened, begun = resolved.opened, time.perf_counter()
    blocks = list(blocks_of(opened.model).values())
    with opened.resources.block(0):
        loading = time.perf_counter() - begun
        for p in blocks[0].parameters():
            hashlib.sha256(tensor_bytes(p.detach().cpu().contiguous()))
        files = FILES * (time.perf_counter() - begun - loading) * n_bytes(opened.model) / n_bytes(blocks[0])
    sample, (one, criterion) = _sample(resolved)
    two, _ = _timed(resolved, sample, 2)
    windows, drawn = sum(map(rows_of, opened.batches)), sum(map(rows_of, sample))
    scale, left = windows / drawn if drawn else 1.0, len(blocks) - resolved.done
    total = files + loading * left + scale * (max(one - loading, 0) + max(left - 1, 0) * max(two - one - loading, 0))
    rate = sum(criterion.values()) / sum(out * columns for out, columns in criterion)
    chosen = [x.shape for x in opened.layers if x.block >= resolved.done]
    total += sum(criterion.get(shape, rate * shape[0] * shape[1]) for shape in chosen) / world()
    if resolved.request.refine != "none":
        ends = [_timed(resolved, sample, depth, Refine(epochs=1))[0] for depth in (1, 2)]
        total += left * Refine.epochs * scale * max(ends[1] - ends[0], 0)
    text = f" with {drawn} of {windows} windows" if drawn else ""
    measured = f"{min(2, len(blocks))} of {len(blocks)} blocks{text} in {time.perf_counter() - begun:.1f} s"
    return replace(estimate(resolved), seconds=round(total, 1), measured=measured)


def _sample(resolved: ResolvedRequest) -> tuple[list[Batch], tuple[float, dict[Shape, float]]]:
    """The calibration batches to measure with, and the times of the first block with them.

    One window per process (`LEAST` where blocks are refined), or whole batches if they take less than `SAMPLE`.
    """
    batches, count = resolved.opened.batches, LEAST if resolved.request.refine != "none" else 1
    enough = max(world(), math.ceil(count / rows_of(batches[0]))) if batches else 0
    sample = [select_rows(batch, slice(0, count)) for batch in batches[:enough]]
    times = _timed(resolved, sample, 1)
    more = int(SAMPLE / gather(times[0])[0] * count / max(map(rows_of, batches), default=1))
    if batches and more > 0:
        sample = batches[: more * world()]
        times = _timed(resolved, sample, 1)
    return sample, times


def _timed(
    resolved: ResolvedRequest, batches: Sequence[Batch], depth: int, refine: Refine | None = None
) -> tuple[float, dict[Shape, float]]:
    """Seconds of pruning the first `depth` blocks without the criterion, and of the criterion by layer shape."""
    request, opened = resolved.request, resolved.opened
    method = resolved.method if refine is None else Method("magnitude", {})
    pattern = request.pattern if resolved.plan is None else str(resolved.plan.pattern)
    with first_blocks(opened.model, depth):
        kinds = {layer.kind for layer in opened.layers}
        layers = [x for x in find_layers(opened.model) if x.kind in kinds] or find_layers(opened.model)
        if refine is None:  # one layer of each shape in the first block; of two blocks only the smallest
            layers = sorted({x.shape: x for x in layers if x.block == layers[-1].block}.values(), key=_size)
            layers = layers[:1] if depth > 1 else layers
        rows = Table(tuple(Row(x.name, x.block, x.kind, x.shape) for x in layers))
        plan = allocate(rows, None if ":" in pattern else resolved.target, allocator="uniform", pattern=pattern)
        gradients = resolved.gradients
        if gradients is not None and any(x.name not in gradients for x in layers):
            gradients = None  # a file of later blocks only
        start, part = time.perf_counter(), replace(opened, layers=layers, batches=list(batches))
        results = prune_with(part, plan, method, gradients=gradients, refine=refine)
        elapsed = time.perf_counter() - start
    return elapsed - sum(x.seconds for x in results) / world(), {x.shape: x.seconds for x in results}


def _size(layer: Layer) -> int:
    return math.prod(layer.shape)
