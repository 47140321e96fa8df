"""Estimate a quantizing job: memory by the formula of pruning, and time by quantizing the first block.

The job's own loop runs on the first block, with an eighth of the calibration windows, and every layer gets the type
that is most common among those of its kind. The time of the quantizer is scaled by the number of weights, that of the
forward passes and of tuning by the numbers of windows and blocks. Nothing is written, and the weights are restored.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

from billhook.architectures.layers import find_layers
from billhook.architectures.stacks import blocks_of, first_blocks, has_one_stack
from billhook.engine.batch import Batch, row_length, rows_of
from billhook.engine.loop import LayerResult, apply_plan_
from billhook.plan.plan import Plan
from billhook.plan.spec import Spec
from billhook.recovery.block_scales import ScaleTuner
from billhook.recovery.blockwise import LEAST
from billhook.steps.estimate import PROCESS, Estimate, peak_bytes, scored_length
from billhook.steps.quantize_job import QuantizeJob
from billhook.steps.types import outside_parameter, plan_types

PART = 8  # one in so many calibration batches is used


def estimate_quantize(job: QuantizeJob) -> Estimate:
    """Memory and disk of a checked request."""
    opened = job.opened
    sizes = [rows_of(batch) * row_length(opened.model, batch) for batch in opened.batches]
    needs = () if job.known is not None else job.method.observed
    outside = max((outside_parameter(opened.model, name).numel() for name in job.outside), default=0)
    memory = peak_bytes(
        opened.model, opened.layers, job.request.quantizer, needs,
        tokens=sum(sizes), batch_tokens=max(sizes, default=0), length=scored_length(opened), outside=outside,
        fisher=bool(job.plan.made_by.get("levels")), resources=opened.resources, refine=job.request.recipe == "best",
    )  # fmt: skip
    return Estimate(round((PROCESS + memory) / 2**30, 3), round(job.room / 2**30, 3))


def estimate_quantize_time(job: QuantizeJob) -> Estimate:
    """`estimate_quantize`, with the time of quantizing measured on the first block.

    No time is measured for a model in stages, and where the job changes no kind of layer that the first block has.
    """
    opened, known = job.opened, estimate_quantize(job)
    if not has_one_stack(opened.model):
        return known
    begun, blocks, batches = time.perf_counter(), len(blocks_of(opened.model)), _some(job)
    start = time.perf_counter()
    results = _first_block(job, batches)
    took = time.perf_counter() - start
    if not results:
        return known
    quantizing = sum(result.seconds for result in results)
    windows, drawn = sum(map(rows_of, opened.batches)), sum(map(rows_of, batches))
    total = (
        quantizing / sum(result.n for result in results) * sum(out * columns for out, columns in job.shapes.values())
    )
    total += (took - quantizing) * blocks * (windows / drawn if drawn else 1)
    text = f" with {drawn} of {windows} windows" if drawn else ""
    measured = f"1 of {blocks} blocks{text} in {time.perf_counter() - begun:.1f} s"
    return replace(known, seconds=round(total, 1), measured=measured)


def _some(job: QuantizeJob) -> Sequence[Batch]:
    """One in `PART` of the batches of a job, with the windows that tuning needs."""
    batches = job.opened.batches
    count = -(-len(batches) // PART)
    if job.request.recipe == "best" and batches:
        count = max(count, -(-LEAST // rows_of(batches[0])))
    return batches[:count]


def _first_block(job: QuantizeJob, batches: Sequence[Batch]) -> list[LayerResult]:
    """Quantize the first block; no results where the job changes no kind of layer that it has."""
    opened, types = job.opened, plan_types(job.plan)
    of_kind = {layer.kind: [types[x.name] for x in opened.layers if x.kind == layer.kind] for layer in opened.layers}
    with first_blocks(opened.model, 1):
        layers = [layer for layer in find_layers(opened.model) if layer.kind in of_kind]
        if not layers:
            return []
        weights = {layer.name: Spec(type=statistics.mode(of_kind[layer.kind])) for layer in layers}
        tuner = None
        if job.request.recipe == "best":
            tuner = ScaleTuner(opened.model, batches, opened.resources, job.request.seed, lambda layer, weight: None)
        return apply_plan_(
            opened.model, Plan(job.plan.budget, weights), job.method, batches, layers=layers, known=job.known,
            tuner=tuner, resources=opened.resources, made=tuner.made if tuner else lambda layer, weight: None,
        )  # fmt: skip
