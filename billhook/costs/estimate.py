"""What a job will cost, before it starts: seconds, memory and disk, by the cost model (`billhook.costs.prices`) and a
moment of measuring.

Estimate is a range: what ends early may take the least of it. Where the machine is as busy then as now, a run that
takes longer than a few seconds lies within it or less than a factor of 1.5 outside.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from billhook.architectures.layers import SIBLINGS, expert_share, find_blocks
from billhook.comparison.grid import Cell, Grid
from billhook.costs import prices, workload
from billhook.costs.counts import Part, Sizes, Text
from billhook.costs.prices import Machine
from billhook.costs.workload import Case, Phase
from billhook.distributed.collectives import world
from billhook.engine.activation_store import SPILL_GIB
from billhook.engine.streaming import stream_of
from billhook.evaluation.batching import batch_size
from billhook.evaluation.perplexity import vocabulary_size
from billhook.steps.record import gradient_of
from billhook.steps.request import Opened
from billhook.steps.resolve import ResolvedRequest
from billhook.trials.trials import Setting

MOMENT = 3e8  # operations of attention that are timed at once, at most
ROUND, ROUNDS = 2e-3, 5  # seconds that something is repeated for at least, and how often, of which the median counts
Estimate = dict[str, float]


def estimate(draft: ResolvedRequest) -> Estimate:
    """`seconds` for measuring, trying plans, pruning and writing at most, `seconds_least` where what can end early
    does, peak `memory_gib` and `disk_gib`."""
    request, opened, options = draft.request, draft.opened, draft.criterion_options
    given, written = draft.gradients is not None, opened.source is not None

    def phases(case: Case) -> Iterator[Phase]:
        if draft.plan is None:
            yield from workload.decide(case, request.allocator, draft.needed, request.criterion, options)
        left = tuple(part for part in case.sizes.parts if part.block >= draft.done)
        case = replace(
            case, streamed=written and not draft.in_memory, sizes=replace(case.sizes, parts=left or case.sizes.parts)
        )
        yield from workload.prune(
            case, request.criterion, options, given=given, refine=request.refine != "none", write=written
        )
        if draft.packed is not None:
            yield workload.pack(case)

    made = (
        0
        if given or not gradient_of(request, options)
        else 4 * sum(layer.shape[0] * layer.shape[1] for layer in opened.layers)
    )
    disk = _bytes(opened) + made
    return _said(opened, request.device, phases, disk, sparsity=draft.target, spill_gib=request.spill_gib)


def estimate_table(opened: Opened, metrics: Sequence[str], device: str) -> Estimate:
    """The same for measuring, which writes next to nothing."""
    return _said(opened, device, lambda case: workload.measure(case, metrics))


def estimate_gradients(opened: Opened, device: str, spill_gib: float) -> Estimate:
    """The same for gradients; what is spilled is not counted."""
    disk = 4 * sum(layer.shape[0] * layer.shape[1] for layer in opened.layers)
    return _said(opened, device, lambda case: [workload.gradients(case)], disk, spill_gib=spill_gib)


def estimate_comparison(opened: Opened, windows: Tensor, cells: Sequence[Cell], grid: Grid, device: str) -> Estimate:
    """The same for the cells of a comparison that are to be run; `windows` [windows, length] are scored."""
    count, length = windows.shape
    text = Text(count, length, batch_size(length, vocabulary_size(opened.model), opened.model.dtype.itemsize))
    return _said(opened, device, lambda case: workload.compare(case, grid, cells, text))


def estimate_analysis(opened: Opened, setting: Setting, targets: Sequence[float], device: str) -> Estimate:
    """The same for an analysis of plans, given by their sparsities."""
    return _said(opened, device, lambda case: workload.analyze(case, setting, targets))


def _said(
    opened: Opened,
    device: str,
    phases: Callable[[Case], Iterable[Phase]],
    disk: float = 0.0,
    *,
    sparsity: float = 0.5,
    spill_gib: float = SPILL_GIB,
) -> Estimate:
    """What phases cost, as the case ends early or not, on this machine as it is now."""
    streamed = stream_of(opened.model) is not None
    case = Case(sizes_of(opened), text_of(opened), sparsity, streamed, spill_gib * 2**30, world())
    shapes = shapes_of(opened)
    machine = Machine(**speeds(opened.model.dtype, device, **shapes), processes=world())
    least, most = (list(phases(replace(case, early=early))) for early in (True, False))
    times = (sum(sum(prices.seconds(phase.counts, machine).values()) for phase in found) for found in (least, most))
    return {
        **dict(zip(("seconds_least", "seconds"), (round(took, 1) for took in times), strict=True)),
        "memory_gib": round(max(phase.memory for phase in most) / 2**30, 3),
        "disk_gib": round(disk / 2**30, 3),
    }


def _bytes(opened: Opened) -> int:
    return sum(p.numel() * p.element_size() for p in opened.model.parameters())


def text_of(opened: Opened) -> Text:
    """The calibration windows."""
    if not opened.batches:
        return Text()
    return Text(sum(map(len, opened.batches)), opened.batches[0].shape[1], len(opened.batches[0]))


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
    itemsize = opened.model.dtype.itemsize
    return Sizes(
        tuple(parts),
        config.num_hidden_layers,
        config.hidden_size,
        itemsize,
        outside,
        whole,
        vocabulary_size(opened.model),
    )


def shapes_of(opened: Opened) -> dict[str, Any]:
    """What is timed for a model: a product [rows, in] x [in, out] and attention [windows, heads, length, head], its own
    or smaller."""
    config = opened.model.config.get_text_config(decoder=True)
    text, heads = text_of(opened), config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = min(max(text.length * text.batch, 64), 512) if text.windows else 512
    length = min(text.length, 2048) if text.windows else 256
    windows = max(1, min(text.batch, 1024 // length))
    few = max(1, min(heads, int(MOMENT / (4 * windows * length**2 * head))))
    widest = max(layer.shape[0] for layer in opened.layers)
    return {
        "product": (rows, min(config.hidden_size, 1024), min(widest, 1024)),
        "attention": (windows, few, length, head),
    }


def speeds(
    dtype: torch.dtype,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
    product: Sequence[int] = (512, 1024, 1024),
    attention: Sequence[int] = (4, 4, 256, 64),
) -> dict[str, float]:
    """What the machine does now: `product` in a type, `single` in float32 and `attention` (operations a second), `copy`
    (bytes a second), and the seconds of a small operation, `op`."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def timed(work: Callable[[], Any]) -> float:
        rounds: list[float] = []
        times = 1
        for _ in range(
            2 + ROUNDS
        ):  # the first round warms up, the second tells how often one that lasts is to be repeated
            start = clock()
            for _ in range(times):
                work()
            wait()
            rounds.append((clock() - start) / times)
            times = max(1, min(int(ROUND / max(rounds[min(len(rounds) - 1, 1)], 1e-9)), 1000))
        return statistics.median(rounds[2:])

    def products(kind: torch.dtype) -> float:
        rows, inputs, out = product
        a, b = torch.ones(rows, inputs, dtype=kind, device=device), torch.ones(out, inputs, dtype=kind, device=device)
        return 2 * rows * inputs * out / timed(lambda: functional.linear(a, b))

    states = torch.ones(*attention, dtype=dtype, device=device)
    attends = timed(lambda: functional.scaled_dot_product_attention(states, states, states, is_causal=True))
    source, small = torch.ones(8 << 20, device=device), torch.ones(8, device=device)
    target = torch.empty_like(source)
    single = products(torch.float32)
    return {
        "product": single if dtype == torch.float32 else products(dtype),
        "single": single,
        "attention": 4 * states.numel() * attention[2] / attends,
        "copy": 2 * source.nbytes / timed(lambda: target.copy_(source)),
        "op": timed(lambda: small.add_(1.0)),
    }


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
