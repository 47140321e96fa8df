"""What a job will cost, before it starts: seconds, memory and disk, by the cost model (`billhook.costs`) and a moment of measuring.

The times are good to about a factor of two where the machine is as busy then as now.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from billhook import costs
from billhook.arch import SIBLINGS, expert_share, find_blocks
from billhook.blocks.streaming import stream_of
from billhook.costs import Machine, Method, Part, Sizes, Text
from billhook.criteria import CRITERIA
from billhook.criteria.admm import default_steps
from billhook.job import Job
from billhook.metrics import fact
from billhook.parallel.ranks import world
from billhook.run.request import Opened
from billhook.stats import GRADIENTS, STATISTICS

Said = dict[str, float]


def estimate(job: Job) -> Said:
    """Return `seconds` for pruning, peak `memory_gib` and `disk_gib`."""
    method = method_of(job.request.criterion, job.criterion_options, given=job.gradients is not None, sparsity=job.plan.target)
    found = _said(job.opened, method, job.request.spill_gib * 2**30, job.request.device)
    return found | {"disk_gib": round(_bytes(job.opened) / 2**30, 3)}


def estimate_table(opened: Opened, metrics: Sequence[str], device: str) -> Said:
    """The same for measuring, which writes next to nothing; metrics of the loss are not counted."""
    return _said(opened, measuring_of(metrics), float("inf"), device) | {"disk_gib": 0.0}


def method_of(criterion: str, options: Mapping[str, Any] | None = None, *, given: bool = False, sparsity: float = 0.5) -> Method:
    """What a criterion costs; `given` are gradients that need not be computed."""
    options = CRITERIA.configure(criterion, dict(options or {}))
    needs = CRITERIA.needs(criterion, options)
    statistics = tuple(name for name in needs if name in STATISTICS)
    gradients = not given and any(name in GRADIENTS for name in needs)
    if criterion == "admm":
        return Method(statistics, gradients, 4.0, partial(_admm, options.get("steps"), sparsity))
    return Method(statistics, gradients, 1.0, costs.sparsegpt if "gram" in statistics else lambda part: {})


def measuring_of(metrics: Sequence[str]) -> Method:
    """What measuring costs."""
    of_text = [name for name in metrics if fact(name).reads == "activations"]
    of_weights = any(not fact(name).needs_text for name in metrics)
    return Method(("input_norm",) if of_text else (), False, float(len(of_text)), costs.spectrum if of_weights else lambda part: {}, True)


def _admm(steps: int | None, sparsity: float, part: Part) -> dict[str, float]:
    return costs.admm(part, default_steps(part.inputs) if steps is None else steps, sparsity)


def _said(opened: Opened, method: Method, spill: float, device: str) -> Said:
    speed = speeds(opened.model.dtype, device)
    machine = Machine(speed["product"], speed["single"], speed["copy"], processes=world())
    length = opened.batches[0].shape[1] if opened.batches else 1
    windows = sum(len(batch) for batch in opened.batches)
    text = Text(windows, length, len(opened.batches[0]) if opened.batches else 1)
    streamed = stream_of(opened.model) is not None
    cost = costs.cost(sizes_of(opened), method, text, machine, streamed=streamed, spill=spill)
    return {"seconds": round(cost.seconds, 1), "memory_gib": round(cost.memory / 2**30, 3)}


def sizes_of(opened: Opened) -> Sizes:
    """The sizes of a model that was opened."""
    config = opened.model.config.get_text_config(decoder=True)
    share = expert_share(opened.model)
    numbers: dict[int, int] = {}
    parts = []
    for layer in opened.layers:
        number = numbers[layer.block] = numbers.get(layer.block, -1) + 1
        leads = layer.kind.rpartition(".")[2] not in SIBLINGS
        parts.append(Part(*layer.shape, layer.block, number, 1.0 if layer.expert is None else share, leads))
    whole = _bytes(opened)
    outside = whole - sum(p.numel() * p.element_size() for p in find_blocks(opened.model)[1].parameters())
    return Sizes(tuple(parts), config.num_hidden_layers, config.hidden_size, opened.model.dtype.itemsize, outside, whole)


def _bytes(opened: Opened) -> int:
    return sum(p.numel() * p.element_size() for p in opened.model.parameters())


def speeds(dtype: torch.dtype, device: str, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """What the machine does now: `product` in a type and `single` in float32 (operations a second), `copy` (bytes a second)."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def timed(work: Callable[[], Any], times: int = 4) -> float:
        work()
        wait()
        start = clock()
        for _ in range(times):
            work()
        wait()
        return (clock() - start) / times

    def product(kind: torch.dtype) -> float:
        a, b = (torch.ones(size, 1024, dtype=kind, device=device) for size in (512, 1024))
        return 2 * 512 * 1024 * 1024 / timed(lambda: a @ b)

    source = torch.ones(8 << 20, device=device)
    target = torch.empty_like(source)
    single = product(torch.float32)
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source))
    return {"product": single if dtype == torch.float32 else product(dtype), "single": single, "copy": copy}


def too_little(cost: Mapping[str, float]) -> str | None:
    """What to say where less memory is free than a job takes."""
    free = available_gib()
    if free is None or cost["memory_gib"] <= free:
        return None
    advice = "use fewer --samples, a shorter --length, a smaller --batch-size or a smaller --spill-gib."
    return f"only {free:.2f} GiB of memory are free, about {cost['memory_gib']:.2f} are needed: {advice}"


def available_gib() -> float | None:
    """Memory that the system could still give, in GiB; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)


def peak_gib() -> float:
    """The most memory that this process has had so far, in GiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)
