"""`billhook.compare`: prune one model by every combination of allocator, criterion, pattern, sparsity and seed, and
score each on one text.

What cells share is computed once: the model is loaded once and its dense weights are restored before each cell; metrics
of weights are measured once, those of activations and gradients once per seed; the dense model is scored once. Every
cell prunes block by block as `billhook prune` does. The scored text is never used to choose anything.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.comparison.axes import Grid
from billhook.comparison.record import SCORES, TITLES, Cell, Comparison, measure_of, method, shown
from billhook.comparison.scored import Scored, scored
from billhook.engine.batch import rows_of
from billhook.engine.gradient_file import Gradients
from billhook.engine.method import Method
from billhook.engine.restore import restore_
from billhook.errors import BillhookError
from billhook.evaluation.block_errors import block_errors, block_outputs
from billhook.measurement.measure import measure
from billhook.plan.allocators import allocate
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.racing.automatic import choose
from billhook.racing.race import AllocationProblem
from billhook.recovery.blockwise import Refine
from billhook.steps.apply import prune_with
from billhook.steps.facts import all_versions
from billhook.steps.gradients import check_temporary_room, make_gradients
from billhook.steps.keywords import CompareFields
from billhook.steps.prune_job import PruneRequest
from billhook.steps.request import Opened, calibration_facts, open_request
from billhook.store.compute import dtype_name
from billhook.store.files import json_text
from billhook.text.corpus import is_token_file
from billhook.text.given import holds_ids

_WHO = "This comparison"


@pinned
def compare(
    model: str | Path | PreTrainedModel,
    grid: Grid,
    data: str,
    *,
    limit: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
    **fields: Unpack[CompareFields],
) -> Comparison:
    """Run a grid and score every cell on at most `limit` windows of `data`; the model's weights are restored.

    `output` is a directory for compare.json, which is written after every cell: the same call continues an interrupted
    comparison. `fields` are those of `PruneRequest` (calibration, samples, length, targets, ...). `progress` is called
    with a line for each cell. Raises BillhookError, before anything is pruned, for an impossible request and where the
    directory holds another comparison.
    """
    grid.check()
    request = PruneRequest(model, **fields)
    _check_seeds(grid, request)
    cells = list(grid.cells(request.seed))
    opened = open_request(request, any(map(grid.reads_text, cells)), _WHO)
    for plan in grid.plans.values():
        plan.check({layer.name: layer.shape for layer in opened.layers})
    read = scored(opened, request, data, limit)
    folder = None if output is None else Path(output)
    found = Comparison.open(folder, _identity(grid, request, opened, read), overwrite)
    _check_plans(found, grid)
    _check_room(found, grid, cells, opened)
    read.note(opened.model)
    with TemporaryDirectory(prefix="billhook.") as scratch:
        runner = _Runner(grid, request, opened, read, Path(scratch))
        if not found.dense:
            found.dense = read.scores(opened.model)
            found.write()
        try:
            for number, cell in enumerate(cells, start=1):
                if not found.has(cell):
                    found.add(row := runner.run(cell))
                    progress(f"{number}/{len(cells)} {_line(row)}")
        finally:
            runner.restore()
    return found


def _check_seeds(grid: Grid, request: PruneRequest) -> None:
    """Raise BillhookError where calibration windows cannot be drawn more than once."""
    text = request.calibration
    if grid.seeds > 1 and (is_token_file(str(text)) if isinstance(text, str | Path) else holds_ids(text)):
        raise BillhookError("Seeds draw calibration windows from a text; given tokens are always the same windows.")
    if grid.seeds > 1 and isinstance(text, Iterator):
        raise BillhookError("Seeds read the calibration text more than once: give a list instead of an iterator.")


def _line(row: Mapping[str, Any]) -> str:
    name, words = measure_of(row), f"{method(row)}, {row['pattern']} {row['sparsity']:g}, seed {row['seed']}"
    return f"{words}: {TITLES[name]} {shown(name, row[name], 4)}"


def _identity(grid: Grid, request: PruneRequest, opened: Opened, read: Scored) -> dict[str, Any]:
    """What a comparison depends on apart from its cells; it can be continued only with the same values."""
    return {
        "model": opened.facts,
        "protocol": read.protocol,
        "data": read.data,
        "calibration": calibration_facts(opened),
        "options": dict(grid.options),
        **request.selection,
        "group": request.group,
        "dtype": dtype_name(opened.model.dtype),
        "versions": all_versions(),
    }


def _check_plans(found: Comparison, grid: Grid) -> None:
    """Raise BillhookError where a finished cell used another plan of the same name."""
    for row in found.cells:
        name = row["allocator"]
        if name in grid.plans and row.get("plan") != _digest(grid.plans[name]):
            raise BillhookError(f"Finished cells of this comparison used another {name}: rename the plan.")


def _check_room(found: Comparison, grid: Grid, cells: Sequence[Cell], opened: Opened) -> None:
    """Raise JobError where the gradients of the missing cells, and those of a race, do not fit on the disk."""
    missing = [cell for cell in cells if not found.has(cell)]
    reading = {cell: Method(cell.criterion, grid.criterion_options(cell)).gradient for cell in missing}
    files = {(statistic, cell.seed) for cell, statistic in reading.items() if statistic}
    raced = any(grid.raced(cell) for cell, statistic in reading.items() if statistic)
    check_temporary_room(opened.layers, len(files) + raced)


def _digest(plan: Plan) -> str:
    return hashlib.sha256(json_text(plan.to_json()).encode()).hexdigest()


class _Runner:
    """Runs cells on one model and caches what they share; gradients are stored in files in the directory `scratch`."""

    def __init__(self, grid: Grid, request: PruneRequest, opened: Opened, read: Scored, scratch: Path) -> None:
        self.grid, self.request, self.opened, self.scratch = grid, request, opened, scratch
        self.read, self._batch = read, read.batch
        columns = (name for cell in grid.cells(request.seed) for name in grid.columns(cell))
        self._columns = list(dict.fromkeys(columns))
        self._weights = {layer.name: layer.weight.clone() for layer in opened.layers}
        self._dense = block_outputs(opened.model, self._batch)
        self._drawn = {request.seed: opened}
        self._tables: dict[int | None, Table] = {}
        self._gradients: dict[tuple[str, int], Gradients] = {}

    def restore(self) -> None:
        """Restore the dense weights of the model."""
        restore_(self.opened.layers, self._weights)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Prune by one cell, score the model, and return the cell's row of compare.json."""
        self.restore()
        opened, model = self._draw(cell.seed), self.opened.model
        way = self.grid.recipe(cell)
        group = self.request.group or way.group
        method = Method(cell.criterion, self.grid.criterion_options(cell), group, prefix=way.prefix)
        plan = self._plan(cell, opened, method)
        method = replace(method, rounding=self.request.rounding)
        refine = Refine.asked(self.grid.recipe(cell).refine, cell.seed)
        results = prune_with(opened, plan, method, gradients=self._gradient(method, cell.seed), refine=refine)
        found = self.read.scores(model)
        return {
            **cell._asdict(),
            **({"plan": _digest(plan)} if cell.allocator in self.grid.plans else {}),
            **{key: found[key] for key in ("token_ppl", "nll", *SCORES) if key in found},
            "achieved": sum(r.zeros for r in results) / sum(r.n for r in results),
            "sparsity_by_block": _by_block(opened, plan),
            "error_by_block": block_errors(block_outputs(model, self._batch), self._dense),
            "notes": [f"{r.layer}: {note}" for r in results for note in r.notes],
        }

    def _plan(self, cell: Cell, opened: Opened, method: Method) -> Plan:
        if cell.allocator in self.grid.plans:
            return self.grid.plans[cell.allocator]
        table = self._table(cell.seed)
        options = self.grid.allocator_options(cell)
        if self.grid.raced(cell):
            assert opened.samples is not None
            problem = AllocationProblem(table, cell.sparsity, cell.pattern)
            return choose(
                opened.model, opened.layers, opened.samples, problem, method, allocator=cell.allocator,
                options=options, batch_size=rows_of(opened.batches[0]), seed=cell.seed,
            )  # fmt: skip
        return allocate(table, cell.sparsity, allocator=cell.allocator, pattern=cell.pattern, **options)

    def _draw(self, seed: int) -> Opened:
        """The model with the calibration windows of a seed."""
        if seed not in self._drawn:
            self._drawn[seed] = open_request(replace(self.request, model=self.opened.model, seed=seed), True, _WHO)
        return self._drawn[seed]

    def _table(self, seed: int) -> Table:
        """The metrics of all allocators: those of weights are measured once, those of text once per seed."""
        columns = self._columns
        of_text = [name for name in columns if fact(name).needs_text]
        model, layers = self.opened.model, self.opened.layers
        if None not in self._tables:
            of_weights = [name for name in columns if name not in of_text]
            self._tables[None] = measure(model, of_weights, layers=layers, facts=self.opened.facts)
        table = self._tables[None]
        if of_text and seed not in self._tables:
            found = zip(table, measure(model, of_text, batches=self._draw(seed).batches, layers=layers), strict=True)
            rows = [replace(a, metrics=a.metrics | b.metrics, curves=a.curves | b.curves) for a, b in found]
            self._tables[seed] = Table(tuple(rows), table.model)
        return self._tables[seed] if of_text else table

    def _gradient(self, method: Method, seed: int) -> Gradients | None:
        """The gradients of the dense model that the criterion reads, computed once per seed."""
        statistic = method.gradient
        if statistic and (statistic, seed) not in self._gradients:
            path = self.scratch / f"{statistic}-{seed}.safetensors"
            self._gradients[statistic, seed] = make_gradients(self._draw(seed), statistic, path)
        return self._gradients.get((statistic, seed))


def _by_block(opened: Opened, plan: Plan) -> dict[str, float]:
    """The mean sparsity over the weights of each block, by block number."""
    sums: dict[str, list[float]] = {}
    for layer in sorted(opened.layers, key=lambda layer: layer.block):
        n = layer.shape[0] * layer.shape[1]
        removed, total = sums.setdefault(str(layer.block), [0.0, 0.0])
        sums[str(layer.block)] = [removed + n * plan.sparsity[layer.name], total + n]
    return {block: removed / total for block, (removed, total) in sums.items()}
