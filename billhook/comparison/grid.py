"""Running a grid: one model, pruned by every combination of allocator, criterion, pattern, sparsity and seed, and
scored on one text.

What cells share is computed once: the model is loaded once and its weights put back after each cell; spectra are
measured once, statistics of activations and gradients once for each seed; the dense model is scored once. Every cell
prunes block by block as `billhook prune` does. The text that is scored is never used to choose anything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.analysis import WINDOWS, block_outputs, relative_error
from billhook.comparison.record import Comparison, finite
from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.loop import prune_
from billhook.engine.restore import restore_, restored
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import PROTOCOL, check_length, context_length, evaluate, vocabulary_size
from billhook.measurement.measure import measure
from billhook.methods.sparse import CRITERIA
from billhook.methods.statistics import GRADIENTS
from billhook.plan.allocators import ALLOCATORS, AUTO, allocate, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Pattern
from billhook.plan.table import Row, Table
from billhook.racing import automatic
from billhook.racing.race import Problem
from billhook.registry import hint
from billhook.steps.evaluate import versions
from billhook.steps.request import Opened, Request, calibration_facts, listed, open_request
from billhook.store.checkpoint import load_tokenizer
from billhook.text.windows import Windows, load_windows
from billhook.trials.trials import Setting

Progress = Callable[[str], None]
Cell = tuple[str, float, str, str, int]  # pattern, sparsity, allocator, criterion, seed


@dataclass(frozen=True)
class Grid:
    """The axes of a comparison, each a list of names or numbers, and the `options` of all methods as given."""

    sparsities: Sequence[float] = (0.5,)
    allocators: Sequence[str] = ("uniform",)
    criteria: Sequence[str] = ("wanda",)
    patterns: Sequence[str] = ("unstructured",)
    seeds: int = 1
    options: Mapping[str, Any] | None = None

    def check(self) -> None:
        """Raise BillhookError for an empty axis, an unknown name, an impossible number, and an option that no method
        has."""
        for name, axis in (
            ("sparsities", self.sparsities),
            ("allocators", self.allocators),
            ("criteria", self.criteria),
        ):
            if not axis and (name != "sparsities" or "unstructured" in self.patterns):
                raise BillhookError(f"A comparison needs --{name}: give at least one.")
        known = [key for a in self.allocators if a != AUTO for key in ALLOCATORS.options(a)] + [
            key for c in self.criteria for key in CRITERIA.options(c)
        ]
        for key in self.options or {}:
            if key not in known:
                raise BillhookError(
                    f"No method of this comparison has an option {key!r}.{hint(key, known)} Options: "
                    f"{', '.join(known)}."
                )
        list(self.budgets())

    def budgets(self) -> Iterator[tuple[str, float]]:
        """Every pattern with the sparsities it can have: an N:M pattern has its own only."""
        for pattern in dict.fromkeys(self.patterns):
            parsed = Pattern.parse(pattern)
            for sparsity in [None] if parsed.structured else dict.fromkeys(self.sparsities):
                yield str(parsed), check_budget(sparsity, parsed)

    def cells(self, first: int) -> Iterator[Cell]:
        """Every cell; what does not depend on the seed has only the `first`."""
        for (pattern, sparsity), allocator, criterion in product(
            self.budgets(), dict.fromkeys(self.allocators), dict.fromkeys(self.criteria)
        ):
            for seed in range(self.seeds if self.reads_text(allocator, criterion) else 1):
                yield pattern, sparsity, allocator, criterion, first + seed

    def reads_text(self, allocator: str | None = None, criterion: str | None = None) -> bool:
        """Whether a cell, or any, looks at calibration text."""
        of_criteria = [
            n for c in self.criteria if criterion in (None, c) for n in CRITERIA.needs(c, self.of(CRITERIA, c))
        ]
        return bool(of_criteria) or any(fact(n).needs_text for n in self.columns(allocator))

    def columns(self, allocator: str | None = None) -> list[str]:
        """The metrics that an allocator reads, or all of them."""
        chosen = [a for a in self.allocators if allocator in (None, a)]
        of_auto = [n for c in self.criteria for n in automatic.needs(c)] if AUTO in chosen else []
        return list(
            dict.fromkeys(
                [*of_auto, *(n for a in chosen if a != AUTO for n in ALLOCATORS.needs(a, self.of(ALLOCATORS, a)))]
            )
        )

    def of(self, registry: Any, name: str) -> dict[str, Any]:
        """The options of one method, complete."""
        found: dict[str, Any] = registry.configure(
            name, {k: v for k, v in (self.options or {}).items() if k in registry.options(name)}
        )
        return found


def compare(
    model: str | Path | PreTrainedModel,
    grid: Grid,
    data: str,
    *,
    limit: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda line: None,
    begin: Callable[[Opened, Windows, list[Cell]], None] = lambda opened, windows, cells: None,
    **fields: Any,
) -> Comparison:
    """Run a grid and score every cell on windows of `data`, at most `limit`; the model's weights are as before
    afterwards.

    `output` is a directory for compare.json, which is written after every cell, so that an interrupted comparison goes
    on; `fields` are those of `Request` (calibration, samples, length, targets, ...). `progress` is given a line for
    each cell, `begin` the model, the windows and the cells to run before anything is measured. Raises BillhookError for
    what cannot be done as asked, before anything is pruned, and where the directory holds another comparison.
    """
    grid.check()
    if grid.seeds < 1 or (grid.seeds > 1 and str(fields.get("calibration", "")).endswith(".safetensors")):
        raise BillhookError(
            "Seeds draw calibration windows: at least one, and from a text, because a token file always gives the same."
        )
    request = Request(model, **fields)
    opened = open_request(request, grid.reads_text(), "This comparison")
    windows = _windows(opened, request, data, limit)
    made = Comparison.open(
        None if output is None else Path(output), _identity(grid, request, opened, windows), overwrite
    )
    cells = list(grid.cells(request.seed))
    begin(opened, windows, [cell for cell in cells if not made.has(cell)])
    with _Bench(grid, request, opened, windows) as bench:
        if not made.dense:
            made.dense = evaluate(opened.model, windows).to_dict()
            made.write()
        for number, cell in enumerate(cells, start=1):
            if not made.has(cell):
                row = bench.run(cell)
                made.add(row)
                progress(_line(row, number, len(cells)))
    return made


def _line(row: Mapping[str, Any], number: int, cells: int) -> str:
    shown = "beyond measure" if row["token_ppl"] is None else f"{row['token_ppl']:.4f}"
    name = f"{row['criterion']} + {row['allocator']}, {row['pattern']} {row['sparsity']:g}, seed {row['seed']}"
    return f"{number}/{cells} {name}: token perplexity {shown}"


def _windows(opened: Opened, request: Request, data: str, limit: int | None) -> Windows:
    length = request.length or min(2048, context_length(opened.model.config) or 2048)
    check_length(opened.model.config, length)
    home = opened.source or (Path(opened.model.name_or_path) if opened.model.name_or_path else None)
    tokenizer = None if home is None else load_tokenizer(home, trust_remote_code=request.trust_remote_code)
    return load_windows(data, tokenizer, length=length, limit=limit, vocab_size=vocabulary_size(opened.model))


def _identity(grid: Grid, request: Request, opened: Opened, windows: Windows) -> dict[str, Any]:
    """What a comparison must agree in to be continued, and what its numbers depend on; more cells may be asked for
    later."""
    count, length = windows.ids.shape
    return {
        "model": opened.facts,
        "protocol": PROTOCOL,
        "data": {"source": windows.source, "digest": windows.digest, "windows": count, "length": length},
        "calibration": None if opened.calibration is None else calibration_facts(opened),
        "options": dict(grid.options or {}),
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "group": request.group,
        "dtype": str(opened.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


class _Bench:
    """The model with what cells share; puts the dense weights back at the end."""

    def __init__(self, grid: Grid, request: Request, opened: Opened, windows: Windows) -> None:
        self.grid, self.request, self.opened, self.windows = grid, request, opened, windows
        self.model, self.layers = opened.model, opened.layers
        self._dense: list[Tensor] = []
        self._opened = {request.seed: opened}
        self._tables: dict[int, Table] = {}
        self._spectra: Table | None = None
        self._gradients: dict[tuple[str, int], Gradients] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Bench":
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="billhook.")))
        self._weights = self._stack.enter_context(restored(self.layers))
        self._dense = block_outputs(self.model, self.windows.ids[:WINDOWS])
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()

    def _restore(self) -> None:
        restore_(self.layers, self._weights)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Prune by one cell, score, and return its row of compare.json."""
        pattern, sparsity, allocator, criterion, seed = cell
        self._restore()
        batches = self._drawn(seed).batches if self.grid.reads_text() else []
        table, options = self._table(seed), self.grid.of(CRITERIA, criterion)
        if allocator == AUTO:
            drawn = self._drawn(seed)
            assert drawn.calibration is not None
            plan = automatic.choose(
                self.model,
                self.layers,
                drawn.calibration,
                Problem(table, sparsity, pattern),
                Setting(criterion, options, self.request.group),
                batch_size=len(drawn.batches[0]),
                seed=seed,
            )
        else:
            plan = allocate(
                table, sparsity, allocator=allocator, pattern=pattern, **self.grid.of(ALLOCATORS, allocator)
            )
        gradients = self._gradient(criterion, options, seed)
        results = prune_(
            self.model,
            plan,
            criterion=criterion,
            batches=batches,
            layers=self.layers,
            group=self.request.group,
            gradients=gradients,
            **options,
        )
        found = evaluate(self.model, self.windows)
        errors = [
            relative_error(y, x)
            for y, x in zip(block_outputs(self.model, self.windows.ids[:WINDOWS]), self._dense, strict=True)
        ]
        blocks = [
            (sum(plan.sparsity[r.layer] * r.n for r in rows) / sum(r.n for r in rows))
            for rows in table.blocks().values()
        ]
        return {
            "pattern": pattern,
            "sparsity": sparsity,
            "allocator": allocator,
            "criterion": criterion,
            "seed": seed,
            "token_ppl": finite(found.token_ppl),
            "nll": found.nll,
            "achieved": sum(r.zeros for r in results) / sum(r.n for r in results),
            "sparsity_by_block": dict(zip(map(str, table.blocks()), blocks, strict=True)),
            "error_by_block": errors,
            "notes": [f"{r.layer}: {note}" for r in results for note in r.notes],
        }

    def _drawn(self, seed: int) -> Opened:
        """The model with the windows that this seed draws."""
        if seed not in self._opened:
            again = replace(self.request, model=self.model, seed=seed)
            self._opened[seed] = open_request(again, True, "This comparison")
        return self._opened[seed]

    def _table(self, seed: int) -> Table:
        """The columns of all allocators: those of weights measured once, those of text once for each seed."""
        columns = self.grid.columns()
        of_text = [name for name in columns if fact(name).needs_text]
        if self._spectra is None:
            self._restore()
            of_weights = [name for name in columns if name not in of_text]
            self._spectra = measure(self.model, of_weights, layers=self.layers, facts=self.opened.facts)
        if not of_text:
            return self._spectra
        if seed not in self._tables:
            self._restore()
            found = measure(self.model, of_text, batches=self._drawn(seed).batches, layers=self.layers)
            rows = tuple(_joined(a, b) for a, b in zip(self._spectra.rows, found.rows, strict=True))
            self._tables[seed] = Table(rows, self._spectra.model)
        return self._tables[seed]

    def _gradient(self, criterion: str, options: Mapping[str, Any], seed: int) -> Gradients | None:
        """The dense model's gradients that the criterion reads, computed once for each seed."""
        statistic = next((name for name in CRITERIA.needs(criterion, options) if name in GRADIENTS), None)
        if statistic is None:
            return None
        if (statistic, seed) not in self._gradients:
            self._restore()
            path = self._folder / f"{statistic}-{seed}.safetensors"
            self._gradients[statistic, seed] = compute_gradients(
                self.model, self._drawn(seed).batches, statistic, path, layers=self.layers
            )
        return self._gradients[statistic, seed]


def _joined(a: Row, b: Row) -> Row:
    return replace(a, metrics=a.metrics | b.metrics, curves=a.curves | b.curves)
