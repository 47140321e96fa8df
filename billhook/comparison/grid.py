"""`billhook.compare`: one model pruned by every combination of allocator, criterion, pattern, sparsity and seed, and
scored on one text.

What cells share is computed once: the model is loaded once and its dense weights are restored before each cell; metrics
of weights are measured once, those of activations and gradients once for each seed; the dense model is scored once.
Every cell prunes block by block as `billhook prune` does. The text that is scored is never used to choose anything.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from billhook.comparison.record import Cell, Comparison, finite
from billhook.engine.batch import rows_of
from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import Method
from billhook.engine.restore import restore_
from billhook.errors import BillhookError
from billhook.evaluation.block_errors import block_errors, block_outputs
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.scoring import Scoring
from billhook.measurement.measure import measure
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO, allocate, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.racing import automatic
from billhook.racing.automatic import choose
from billhook.racing.race import Problem
from billhook.registry import hint
from billhook.steps.evaluate import versions
from billhook.steps.prune import prune_with
from billhook.steps.request import Opened, Request, calibration_facts, listed, open_request
from billhook.store.files import json_text
from billhook.tasks.token_windows import tokenizer_of, window_length
from billhook.text.windows import Windows


@dataclass(frozen=True)
class Grid:
    """The axes of a comparison, each a list of names or numbers, and the `options` of all methods as given.

    `plans` (name -> plan) are compared beside what the allocators make, each with its own pattern and sparsity.
    """

    sparsities: Sequence[float] = (0.5,)
    allocators: Sequence[str] = ("uniform",)
    criteria: Sequence[str] = ("wanda",)
    patterns: Sequence[str] = ("unstructured",)
    seeds: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)

    def check(self) -> None:
        """Raise BillhookError for an empty axis, an unknown name, an impossible number, or an option of no method."""
        sparsities = self.sparsities or self.plans or "unstructured" not in self.patterns
        for name, axis in (("sparsities", sparsities), ("allocators", self.allocators), ("criteria", self.criteria)):
            if not axis:
                raise BillhookError(f"A comparison needs --{name}: give at least one.")
        if self.seeds < 1:
            raise BillhookError(f"A comparison needs at least one seed, got {self.seeds}.")
        known = [key for a in self.allocators if a != AUTO for key in ALLOCATORS.options(a)]
        known += [key for c in self.criteria for key in CRITERIA.options(c)]
        for key in self.options:
            if key not in known:
                raise BillhookError(
                    f"No method of this comparison has an option {key!r}.{hint(key, known)} Options: "
                    f"{', '.join(known)}."
                )
        list(self.budgets())

    def budgets(self) -> Iterator[tuple[str, float]]:
        """Every pattern with its sparsities: an N:M pattern has only one."""
        for pattern in dict.fromkeys(self.patterns):
            parsed = Pattern.parse(pattern)
            for sparsity in [None] if parsed.structured else dict.fromkeys(self.sparsities):
                yield str(parsed), check_budget(sparsity, parsed)

    def cells(self, first: int) -> Iterator[Cell]:
        """Every cell; those that do not depend on the calibration text have only the `first` seed."""
        allocated = product(self.budgets(), dict.fromkeys(self.allocators))
        planned = [((str(plan.pattern), plan.target), name) for name, plan in self.plans.items()]
        for ((pattern, sparsity), allocator), criterion in product(
            [*allocated, *planned], dict.fromkeys(self.criteria)
        ):
            for seed in range(self.seeds if self.reads_text(allocator, criterion) else 1):
                yield Cell(pattern, sparsity, allocator, criterion, first + seed)

    def reads_text(self, allocator: str | None = None, criterion: str | None = None) -> bool:
        """Whether a cell, or any, needs calibration text."""
        chosen = [c for c in self.criteria if criterion in (None, c)]
        statistics = [name for c in chosen for name in CRITERIA.needs(c, self.of(CRITERIA, c))]
        return bool(statistics) or any(fact(name).needs_text for name in self.columns(allocator))

    def columns(self, allocator: str | None = None) -> list[str]:
        """The metrics that an allocator reads, or all of them."""
        chosen = [a for a in self.allocators if allocator in (None, a)]
        found = [name for c in self.criteria for name in automatic.needs(c)] if AUTO in chosen else []
        found += [name for a in chosen if a != AUTO for name in ALLOCATORS.needs(a, self.of(ALLOCATORS, a))]
        return list(dict.fromkeys(found))

    def of(self, registry: Any, name: str) -> dict[str, Any]:
        """All options of one method."""
        known = registry.options(name)
        found: dict[str, Any] = registry.configure(name, {k: v for k, v in self.options.items() if k in known})
        return found


def compare(
    model: str | Path | PreTrainedModel,
    grid: Grid,
    data: str,
    *,
    limit: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    begin: Callable[[Opened, Windows, list[Cell]], None] = lambda opened, windows, cells: None,
    **fields: Any,
) -> Comparison:
    """Run a grid and score every cell on windows of `data`, at most `limit`; the model's weights are restored.

    `output` is a directory for compare.json, which is written after every cell: the same call continues an interrupted
    comparison. `fields` are those of `Request` (calibration, samples, length, targets, ...). `progress` is called with
    a line for each cell, `begin` with the model, the windows and the cells to run before anything is measured. Raises
    BillhookError for what cannot be done as asked, before anything is pruned, and where the directory holds another
    comparison.
    """
    grid.check()
    if grid.seeds > 1 and str(fields.get("calibration", "")).endswith(".safetensors"):
        raise BillhookError("Seeds draw calibration windows from a text; a token file always gives the same windows.")
    request = Request(model, **fields)
    opened = open_request(request, grid.reads_text(), "This comparison")
    for plan in grid.plans.values():
        plan.check({layer.name: layer.shape for layer in opened.layers})
    windows, scoring = _windows(opened, request, data, limit)
    folder = None if output is None else Path(output)
    made = Comparison.open(folder, _identity(grid, request, opened, windows, scoring.protocol), overwrite)
    _check_plans(made, grid)
    cells = list(grid.cells(request.seed))
    begin(opened, windows, [cell for cell in cells if not made.has(cell)])
    with TemporaryDirectory(prefix="billhook.") as scratch:
        runner = _Runner(grid, request, opened, (windows, scoring), Path(scratch))
        if not made.dense:
            made.dense = evaluate(opened.model, windows, scoring=scoring).to_dict()
            made.write()
        try:
            for number, cell in enumerate(cells, start=1):
                if not made.has(cell):
                    made.add(row := runner.run(cell))
                    progress(f"{number}/{len(cells)} {_line(row)}")
        finally:
            runner.restore()
    return made


def _line(row: Mapping[str, Any]) -> str:
    ppl = "infinite" if row["token_ppl"] is None else f"{row['token_ppl']:.4f}"
    name = f"{row['criterion']} + {row['allocator']}, {row['pattern']} {row['sparsity']:g}, seed {row['seed']}"
    return f"{name}: token perplexity {ppl}"


def _windows(opened: Opened, request: Request, data: str, limit: int | None) -> tuple[Windows, Scoring]:
    length = window_length(opened.model, request.length)
    tokenizer = tokenizer_of(opened.model, opened.source, trust_remote_code=request.trust_remote_code)
    return opened.task.evaluation(data, tokenizer, opened.model, length, limit)


def _identity(grid: Grid, request: Request, opened: Opened, windows: Windows, protocol: str) -> dict[str, Any]:
    """What a comparison depends on besides its cells: a continued one must agree in all of it, but may add cells."""
    count, length = windows.ids.shape
    return {
        "model": opened.facts,
        "protocol": protocol,
        "data": {"source": windows.source, "digest": windows.digest, "windows": count, "length": length},
        "calibration": None if opened.samples is None else calibration_facts(opened),
        "options": dict(grid.options),
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "group": request.group,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def _check_plans(made: Comparison, grid: Grid) -> None:
    """Raise BillhookError where a finished cell used another plan of the same name."""
    for row in made.cells:
        name = row["allocator"]
        if name in grid.plans and row.get("plan") != _digest(grid.plans[name]):
            raise BillhookError(f"Finished cells of this comparison used another {name}: rename the plan.")


def _digest(plan: Plan) -> str:
    return hashlib.sha256(json_text(plan.to_json()).encode()).hexdigest()


class _Runner:
    """Runs cells on one model, and keeps what they share; files of gradients go to the directory `scratch`."""

    def __init__(
        self, grid: Grid, request: Request, opened: Opened, scored: tuple[Windows, Scoring], scratch: Path
    ) -> None:
        self.grid, self.request, self.opened, self.scratch = grid, request, opened, scratch
        self.windows, self.scoring = scored
        self._batch = self.scoring.batch(self.windows.ids)
        self._weights = {layer.name: layer.weight.clone() for layer in opened.layers}
        self._dense = block_outputs(opened.model, self._batch)
        self._drawn = {request.seed: opened}
        self._tables: dict[int | None, Table] = {}
        self._gradients: dict[tuple[str, int], Gradients] = {}

    def restore(self) -> None:
        """Give the model its dense weights."""
        restore_(self.opened.layers, self._weights)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Prune by one cell, score the model, and return the cell's row of compare.json."""
        self.restore()
        model, criterion = self.opened.model, cell.criterion
        opened, options = self._draw(cell.seed), self.grid.of(CRITERIA, criterion)
        plan = self._plan(cell, opened, options)
        method = Method(criterion, options, self.request.group, self.request.rounding)
        results = prune_with(opened, plan, method, gradients=self._gradient(method, cell.seed))
        found = evaluate(model, self.windows, scoring=self.scoring)
        return {
            **cell._asdict(),
            **({"plan": _digest(plan)} if cell.allocator in self.grid.plans else {}),
            "token_ppl": finite(found.token_ppl),
            "nll": found.nll,
            "achieved": sum(r.zeros for r in results) / sum(r.n for r in results),
            "sparsity_by_block": _by_block(opened, plan),
            "error_by_block": block_errors(model, self._batch, self._dense),
            "notes": [f"{r.layer}: {note}" for r in results for note in r.notes],
        }

    def _plan(self, cell: Cell, opened: Opened, options: dict[str, Any]) -> Plan:
        if cell.allocator in self.grid.plans:
            return self.grid.plans[cell.allocator]
        table = self._table(cell.seed)
        if cell.allocator == AUTO:
            assert opened.samples is not None
            method = Method(cell.criterion, options, self.request.group)
            return choose(
                opened.model,
                opened.task,
                opened.layers,
                opened.samples,
                Problem(table, cell.sparsity, cell.pattern),
                method,
                batch_size=rows_of(opened.batches[0]),
                seed=cell.seed,
            )
        named = self.grid.of(ALLOCATORS, cell.allocator)
        return allocate(table, cell.sparsity, allocator=cell.allocator, pattern=cell.pattern, **named)

    def _draw(self, seed: int) -> Opened:
        """The model with the calibration windows that a seed draws."""
        if seed not in self._drawn:
            again = replace(self.request, model=self.opened.model, seed=seed)
            self._drawn[seed] = open_request(again, True, "This comparison")
        return self._drawn[seed]

    def _table(self, seed: int) -> Table:
        """The metrics of all allocators: those of weights are measured once, those of text once for each seed."""
        columns = self.grid.columns()
        of_text = [name for name in columns if fact(name).needs_text]
        model, layers = self.opened.model, self.opened.layers
        if None not in self._tables:
            of_weights = [name for name in columns if name not in of_text]
            self._tables[None] = measure(model, of_weights, layers=layers, facts=self.opened.facts)
        table = self._tables[None]
        if of_text and seed not in self._tables:
            found = measure(model, of_text, batches=self._draw(seed).batches, layers=layers)
            rows = [
                replace(a, metrics=a.metrics | b.metrics, curves=a.curves | b.curves)
                for a, b in zip(table, found, strict=True)
            ]
            self._tables[seed] = Table(tuple(rows), table.model)
        return self._tables[seed] if of_text else table

    def _gradient(self, method: Method, seed: int) -> Gradients | None:
        """The gradients of the dense model that the criterion reads, computed once for each seed."""
        statistic = method.gradient
        if statistic and (statistic, seed) not in self._gradients:
            path, opened = self.scratch / f"{statistic}-{seed}.safetensors", self._draw(seed)
            self._gradients[statistic, seed] = compute_gradients(
                opened.model, opened.batches, statistic, path, loss=opened.task.loss, layers=opened.layers
            )
        return self._gradients.get((statistic, seed))


def _by_block(opened: Opened, plan: Plan) -> dict[str, float]:
    """The mean sparsity over the weights of each block, by block number."""
    sums: dict[str, list[float]] = {}
    for layer in sorted(opened.layers, key=lambda layer: layer.block):
        n = layer.shape[0] * layer.shape[1]
        removed, total = sums.setdefault(str(layer.block), [0.0, 0.0])
        sums[str(layer.block)] = [removed + n * plan.sparsity[layer.name], total + n]
    return {block: removed / total for block, (removed, total) in sums.items()}
