"""The time of a run of `slim`, measured on the first block whose units lose something, before the run.

Left out are reading and writing what lies outside of the blocks.
"""

import time
from collections.abc import Sequence

from billhook.architectures.stacks import blocks_of, first_blocks, has_one_stack
from billhook.engine.batch import Batch, select_rows
from billhook.engine.removal import Removal, remove_parts_
from billhook.engine.routing import unrestrict_
from billhook.engine.walk import walk
from billhook.steps.slim_job import SlimJob
from billhook.store.shards import weight_bytes

LARGE = 10**9  # bytes of weights, from which the time is worth a measurement
_PASSES = 2  # the predictions that are compared, and those that show that the files are right
_GRADIENTS = 4  # passes of the text: forward, forward again by block, and backward, which counts twice


def announced_time(job: SlimJob) -> float | None:
    """`estimate_slim` of a large model, None for others and for a run that goes on."""
    source = job.opened.source
    large = source is not None and weight_bytes(source) > LARGE and has_one_stack(job.opened.model)
    return estimate_slim(job) if large and job.units and not job.request.resume else None


def estimate_slim(job: SlimJob) -> float:
    """Seconds that removing parts of all blocks and scoring both models take, from those of one block; the model is as
    before afterwards."""
    first, smaller = min(unit.block for unit in job.units), 1 - job.removed / sum(job.parameters)
    seconds, samples = _removing(job, first), job.opened.samples
    if samples is not None:
        scored = samples.heldout or select_rows(samples.batch, slice(0, job.request.drawing.held_out))
        seconds += _PASSES * (1 + smaller) * _reading(job, first, [scored])
    if job.removal.gradient:
        seconds += _GRADIENTS * _reading(job, first, job.opened.batches)
    return seconds * len(blocks_of(job.opened.model))


def _reading(job: SlimJob, first: int, batches: Sequence[Batch]) -> float:
    """Seconds that the blocks up to the first take in a pass of a text, for each of them."""
    begun = time.perf_counter()
    with first_blocks(job.opened.model, first + 1):
        for _ in walk(job.opened.model, batches, layers=[], read_only=True, resources=job.opened.resources):
            pass
    return (time.perf_counter() - begun) / (first + 1)


def _removing(job: SlimJob, first: int) -> float:
    """Seconds that removing parts of the first block takes."""
    opened = job.opened
    units, counts = [unit for unit in job.units if unit.block == first], job.plan.units
    removal = Removal("magnitude", {}) if job.removal.gradient else job.removal.without_target()
    begun = time.perf_counter()
    try:
        with first_blocks(opened.model, first + 1):
            remove_parts_(
                opened.model, units, counts, removal, opened.batches,
                experts=job.request.experts, resources=opened.resources, start=first,
            )  # fmt: skip
    finally:
        unrestrict_(opened.model, units)
    return time.perf_counter() - begun
