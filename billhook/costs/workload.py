"""What each command does, one thing after another, as counts (`billhook.costs.counts`) and bytes held.

Where work may end early (ADMM when its support stands still, refining when the held-out windows get no better, trials
of a search that are clearly behind) a case says whether it does: the truth lies between. Drawing pictures and reading
text are not counted.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from billhook.analysis import WINDOWS as COMPARED
from billhook.comparison.grid import Cell, Grid
from billhook.costs import counts
from billhook.costs.counts import Count, Method, Part, Sizes, Text
from billhook.costs.prices import memory
from billhook.evaluation.kl import K as KEPT
from billhook.measurement.error_curves import FEW, ROWS, TRIED
from billhook.measurement.loss_shares import WINDOWS as SHARED
from billhook.methods.sparse import CRITERIA
from billhook.methods.sparse.admm import RAMP, default_steps
from billhook.methods.statistics import GRADIENTS, STATISTICS
from billhook.plan.allocators import AUTO
from billhook.plan.metrics import CURVES, fact, options_of
from billhook.recover.blockwise import LEAST, PATIENCE, PREDICTED, Refine
from billhook.trials.trials import Setting

REMEMBER, COMPARE, SLOPE, SCORE = 6.0, 1.0, 3.0, 2.0  # what is done with predictions, in readings of them
READ, BISECT, SORT = 3.0, 60.0, 5.0  # readings of all weights for a metric and for a median; rankings for a full sort
FULL = 3  # times that `auto` prunes
OUTPUTS = 5  # numbers that a backward pass keeps of a layer, for each that it gives out
LOOK = Method(dense=True, touches=False)  # nothing is done to any layer

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Phase:
    """A part of a job: what it does, and the bytes that one process holds meanwhile."""

    counts: list[Count]
    memory: float


@dataclass(frozen=True)
class Case:
    """What the parts of a job have in common; `early` lets all end early that can, `copies` are bytes held beside the
    model throughout."""

    sizes: Sizes
    text: Text
    sparsity: float = 0.5
    streamed: bool = True
    spill: float = math.inf
    processes: int = 1
    early: bool = False
    copies: float = 0.0

    def phase(self, method: Method, *more: Iterable[Count], extra: float = 0.0) -> Phase:
        """A walk with a method, and more; `extra` are bytes held meanwhile."""
        held = memory(self.sizes, method, self.text, streamed=self.streamed, spill=self.spill, processes=self.processes)
        done = [*counts.walk(self.sizes, method, self.text), *counts.sent(self.sizes, method)]
        return Phase([*done, *(count for each in more for count in each)], held + self.copies + extra)

    def predictions(self, text: Text, reading: float, *, backward: bool = False) -> Phase:
        """The whole model on a text; `reading` is what is done with what it predicts, 0 where it stops before that."""
        sizes = self.sizes if reading else replace(self.sizes, vocabulary=0)
        kept = OUTPUTS * self.sizes.weights / self.sizes.width if backward else 2 * self.sizes.width
        once = text.batch * text.length * (sizes.vocabulary * (sizes.itemsize + 8) + kept * sizes.itemsize)
        return self.phase(LOOK, counts.predict(sizes, text, logits=reading, backward=backward), extra=once)

    def halved(self) -> tuple["Case", Text]:
        """The case of what tries plans on a part of the text, with the model and a copy of its weights in memory; and
        the other part."""
        text, sizes = self.text, self.sizes
        held = Text(text.windows - text.windows // 2, text.length, max(1, 4096 // text.length))
        kept = sizes.itemsize * sizes.weights + held.tokens * min(KEPT, sizes.vocabulary) * 8
        half = replace(text, windows=text.windows // 2)
        return replace(self, text=half, streamed=False, copies=self.copies + kept), held


def method_of(
    criterion: str, options: Options | None = None, *, given: bool = False, sparsity: float = 0.5, early: bool = False
) -> Method:
    """What a criterion costs; `given` are gradients that need not be computed."""
    options = CRITERIA.configure(criterion, dict(options or {}))
    needs = CRITERIA.needs(criterion, options)
    statistics = tuple(name for name in needs if name in STATISTICS)
    gradients = not given and any(name in GRADIENTS for name in needs)
    if criterion != "admm":
        return Method(statistics, gradients, solves=counts.sparsegpt if "gram" in statistics else counts.nothing)
    given_steps = options["steps"]

    def steps(part: Part) -> int:
        most = default_steps(part.inputs) if given_steps is None else given_steps
        return min(most, counts.CHECK) if early else most

    return Method(
        statistics,
        gradients,
        lambda part: steps(part) + 1.0,
        lambda part: counts.admm(part, steps(part), sparsity, RAMP),
    )


def measuring_of(metrics: Sequence[str]) -> Method:
    """What measuring costs, but for what looks at the loss."""
    kinds = [fact(name) for name in metrics if fact(name).reads not in ("loss", "trial")]
    looks = sum(BISECT if m.name == "wanda_median" else READ for m in kinds if m.needs_text)
    spectra = any(m.spectral or (m.reads == "weight" and m.name not in CURVES) for m in kinds)
    sorts = SORT * sum(m.name in CURVES and not m.spectral for m in kinds)

    def work(part: Part) -> dict[str, float]:
        return {"elements": looks * part.weights} | (counts.spectrum(part) if spectra else {})

    return Method(("input_norm",) if looks else (), False, lambda part: sorts, work, True)


def prune(
    case: Case, criterion: str, options: Options, *, given: bool = False, refine: bool = False, write: bool = False
) -> Iterator[Phase]:
    """Pruning by a plan, refining after each block, and writing the result."""
    method = method_of(criterion, options, given=given, sparsity=case.sparsity, early=case.early)
    tuned: Iterable[Count] = ()
    refine = refine and case.text.windows >= LEAST
    if refine:
        method = replace(method, beside=True)
        tuned = counts.refine(case.sizes, case.text, PATIENCE if case.early else Refine.epochs)
    extra = _tuning(case) if refine else 0.0
    yield case.phase(method, tuned, counts.written(case.sizes) if write else (), extra=extra)


def _tuning(case: Case) -> float:
    """Bytes held while a block is refined: its weights six times and the next block's once in float32, what a step's
    way back needs of both or of predictions, and states of the text twice more."""
    sizes, tokens = case.sizes, min(case.text.windows, counts.STEP) * case.text.length
    weights = sizes.block_bytes / sizes.itemsize
    kept = max(2 * OUTPUTS * weights / sizes.width * tokens, OUTPUTS * sizes.vocabulary * min(tokens, PREDICTED))
    return 4 * (7 * weights + kept) + min(2 * case.text.tokens * sizes.width * sizes.itemsize, 2 * case.spill)


def write(case: Case) -> Phase:
    """Writing the model."""
    return Phase(list(counts.written(case.sizes)), 0.0)


def pack(case: Case) -> Phase:
    """Reading the written model twice and writing it packed."""
    return Phase([*counts.written(case.sizes), *counts.written(case.sizes)], 0.0)


def cheaper(criterion: str, options: Options) -> dict[str, Any]:
    """The options of a trial: ADMM in few steps unless it was told how many."""
    told = {name: value for name, value in options.items() if value is not None}
    return {**({"steps": FEW} if criterion == "admm" else {}), **told}


def measure(case: Case, metrics: Sequence[str]) -> Iterator[Phase]:
    """The columns of a table."""
    if any(fact(name).reads not in ("loss", "trial") for name in metrics):
        yield case.phase(measuring_of(metrics), counts.read(case.sizes) if case.streamed else ())
    for name in metrics:
        if fact(name).reads == "trial":
            yield from _shares(case, options_of(name).get("criterion", "admm"))
        elif fact(name).name == "error_curve":
            yield _curves(case, options_of(name).get("criterion", "admm"))
        elif fact(name).reads == "loss":
            each = case.predictions(case.text, SCORE)
            yield Phase(each.counts * (case.sizes.blocks + 1), each.memory)


def _curves(case: Case, criterion: str) -> Phase:
    """A walk through the dense model, and the criterion on a few rows of each layer."""
    method = method_of(criterion, cheaper(criterion, {}), sparsity=0.5)

    def rows(part: Part) -> Part:
        return replace(part, out=len(TRIED) * min(ROWS, part.out))

    def selections(part: Part) -> float:
        return method.selections(rows(part)) * rows(part).out / part.out

    return case.phase(replace(method, selections=selections, solves=lambda part: method.solves(rows(part)), dense=True))


def _shares(case: Case, criterion: str) -> Iterator[Phase]:
    """One prune, and the predictions of the held-out windows before and after, with the way back."""
    held = min(SHARED, case.text.windows // 2)
    bench, _ = replace(case, sparsity=0.6).halved()
    bench = replace(bench, text=replace(case.text, windows=case.text.windows - held))
    text = Text(held, case.text.length, max(1, 2048 // case.text.length))
    yield bench.predictions(text, REMEMBER)
    yield from prune(bench, criterion, cheaper(criterion, {}))
    yield bench.predictions(text, SLOPE, backward=True)


def choose(case: Case, criterion: str, options: Options) -> Iterator[Phase]:
    """What `billhook.racing.automatic` does once its columns are measured."""
    bench, held = case.halved()
    short = replace(held, batch=max(1, 2048 // held.length))
    if any(name in GRADIENTS for name in CRITERIA.needs(criterion, CRITERIA.configure(criterion, dict(options)))):
        yield gradients(bench)
    yield bench.predictions(held, REMEMBER)
    for number in range(FULL):
        yield from prune(bench, criterion, cheaper(criterion, options), given=True)
        last = number + 1 == FULL
        yield bench.predictions(held if last else short, COMPARE if last else SLOPE, backward=not last)


def decide(case: Case, allocator: str, columns: Sequence[str], criterion: str, options: Options) -> Iterator[Phase]:
    """What is measured and tried before a plan is known."""
    case = replace(case, streamed=case.streamed and allocator != AUTO)
    yield from measure(case, columns)
    if allocator == AUTO:
        yield from choose(case, criterion, options)


def gradients(case: Case) -> Phase:
    """Gradients of the dense model."""
    return case.phase(replace(LOOK, gradients=True))


def compare(case: Case, grid: Grid, cells: Sequence[Cell], scored: Text) -> Iterator[Phase]:
    """A comparison: the dense model scored, the columns of all allocators, and each cell pruned and scored."""
    case = replace(case, streamed=False, copies=float(case.sizes.itemsize * case.sizes.weights))
    seen = replace(scored, windows=min(COMPARED, scored.windows), batch=1)
    score = [case.predictions(scored, SCORE), case.predictions(seen, 0.0)]
    yield from score
    columns, seeds = grid.columns(), {seed for *_, seed in cells}
    yield from measure(case, [name for name in columns if not fact(name).needs_text])
    for _ in seeds:
        yield from measure(case, [name for name in columns if fact(name).needs_text])
    once: set[tuple[str, int]] = set()
    for _, sparsity, allocator, criterion, seed in cells:
        case, options = replace(case, sparsity=sparsity), grid.of(CRITERIA, criterion)
        statistic = Setting(criterion, options).gradient
        if statistic is not None and (statistic, seed) not in once:
            once.add((statistic, seed))
            yield gradients(case)
        if allocator == AUTO:
            yield from choose(case, criterion, options)
        yield from prune(case, criterion, options, given=True)
        yield from score


def analyze(case: Case, setting: Setting, plans: Sequence[float]) -> Iterator[Phase]:
    """An analysis of plans, given by their sparsities."""
    bench, held = case.halved()
    held = replace(held, windows=min(COMPARED, held.windows))
    if setting.gradient:
        yield gradients(bench)
    yield bench.predictions(held, REMEMBER)
    yield bench.predictions(replace(held, batch=1), 0.0)
    for sparsity in plans:
        yield from prune(replace(bench, sparsity=sparsity), setting.criterion, setting.options, given=True)
        yield bench.predictions(replace(held, batch=1), 0.0)
