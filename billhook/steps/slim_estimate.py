"""The time of a run of `slim`, measured on the first block whose units lose something, before the run.

Left out are reading and writing what lies outside of the blocks, and the scores at the end.
"""

import time

from billhook.architectures.stacks import blocks_of, first_blocks, has_one_stack
from billhook.engine.removal import remove_parts_
from billhook.engine.routing import mixture_of
from billhook.steps.slim_job import SlimJob
from billhook.store.shards import weight_bytes

LARGE = 10**9  # bytes of weights, from which the time is worth a measurement


def announced_time(job: SlimJob) -> float | None:
    """`estimate_slim` of a large model, None for others and for a run that goes on."""
    source = job.opened.source
    large = source is not None and weight_bytes(source) > LARGE and has_one_stack(job.opened.model)
    return estimate_slim(job) if large and job.units and not job.request.resume else None


def estimate_slim(job: SlimJob) -> float:
    """Seconds that removing parts of all blocks takes, from that of one; the model is as before afterwards."""
    opened, first = job.opened, min(unit.block for unit in job.units)
    units, counts = [unit for unit in job.units if unit.block == first], job.plan.units
    begun = time.perf_counter()
    try:
        with first_blocks(opened.model, first + 1):
            remove_parts_(
                opened.model, units, counts, job.removal.without_target(), opened.batches,
                experts=job.request.experts, resources=opened.resources, start=first,
            )  # fmt: skip
    finally:
        for unit in units:
            if unit.kind == "experts":
                mixture_of(opened.model, unit)[0].__dict__.pop("forward", None)
    return (time.perf_counter() - begun) * len(blocks_of(opened.model))
