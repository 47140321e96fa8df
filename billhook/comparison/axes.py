"""The axes of a comparison, and the cells of their grid."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from billhook.comparison.record import Cell
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO, ON_MODEL, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.recipes import RECIPES, Recipe, chosen
from billhook.plan.spec import Pattern
from billhook.racing import automatic
from billhook.racing.allocators import registry_of
from billhook.racing.hyperparameters import configure, is_raced
from billhook.registry import hint


@dataclass(frozen=True)
class Grid:
    """The axes of a comparison, each a list of names or numbers, and the `options` of all methods, not parsed yet.

    `recipes` are compared with all pairs of allocator and criterion, and `plans` (by name) with the plans of the
    allocators, each with its own pattern and sparsity.
    """

    sparsities: Sequence[float] = (0.5,)
    allocators: Sequence[str] = ("uniform",)
    criteria: Sequence[str] = ("wanda",)
    patterns: Sequence[str] = ("unstructured",)
    seeds: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    recipes: Sequence[str] = ()

    def check(self) -> None:
        """Raise BillhookError for an empty axis, an unknown name, an impossible number, or an option of no method."""
        sparsities = self.sparsities or self.plans or "unstructured" not in self.patterns
        pairs = (("allocators", self.allocators or self.recipes), ("criteria", self.criteria or self.recipes))
        for name, axis in (("sparsities", sparsities), *pairs):
            if not axis:
                raise BillhookError(f"A comparison needs --{name}: give at least one.")
        if self.seeds < 1:
            raise BillhookError(f"A comparison needs at least one seed, got {self.seeds}.")
        list(self.budgets())
        cells = list(self.cells(0))
        allocators = {c.allocator for c in cells} - {AUTO, *self.plans}
        methods = {f"allocator {name!r}": registry_of(name).options(name) for name in sorted(allocators)}
        methods |= {f"criterion {c.criterion!r}": CRITERIA.options(c.criterion) for c in cells}
        known = list(dict.fromkeys(key for options in methods.values() for key in options))
        for key in self.options:
            if key not in known:
                listed = f"{hint(key, known)} Their options: {', '.join(known) or 'none'}."
                raise BillhookError(
                    f"No method of this comparison ({', '.join(methods)}) has an option {key!r}.{listed}"
                )

    def budgets(self) -> Iterator[tuple[str, float]]:
        """Every pattern with its sparsities, of which an N:M pattern has only one."""
        for pattern in dict.fromkeys(self.patterns):
            parsed = Pattern.parse(pattern)
            for sparsity in [None] if parsed.structured else dict.fromkeys(self.sparsities):
                yield str(parsed), check_budget(sparsity, parsed)

    def cells(self, first: int) -> Iterator[Cell]:
        """Every cell; those that read no calibration text have the `first` seed only."""
        for pattern, sparsity in self.budgets():
            structured = Pattern.parse(pattern).structured
            for name in dict.fromkeys(self.recipes):
                way = chosen(name, "", "", "", structured=structured)
                yield from self._seeds(Cell(pattern, sparsity, way.allocator, way.criterion, name, first))
        plans = [*product(self.budgets(), dict.fromkeys(self.allocators))]
        plans += [((str(plan.pattern), plan.target), name) for name, plan in self.plans.items()]
        for ((pattern, sparsity), allocator), criterion in product(plans, dict.fromkeys(self.criteria)):
            yield from self._seeds(Cell(pattern, sparsity, allocator, criterion, "", first))

    def _seeds(self, cell: Cell) -> Iterator[Cell]:
        for seed in range(self.seeds if self.reads_text(cell) else 1):
            yield cell._replace(seed=cell.seed + seed)

    def reads_text(self, cell: Cell) -> bool:
        """Whether a cell needs calibration text."""
        needs = CRITERIA.needs(cell.criterion, self.criterion_options(cell))
        if needs or self.recipe(cell).refine != "none" or self.raced(cell):
            return True
        return any(fact(name).needs_text for name in self.columns(cell))

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe of a cell, or its allocator and criterion."""
        return RECIPES[cell.recipe] if cell.recipe else Recipe(cell.criterion, cell.allocator, "")

    def criterion_options(self, cell: Cell) -> dict[str, Any]:
        """All options of a cell's criterion, parsed."""
        known = CRITERIA.options(cell.criterion)
        return CRITERIA.configure(cell.criterion, {k: v for k, v in self.options.items() if k in known})

    def allocator_options(self, cell: Cell) -> dict[str, Any]:
        """All options of a cell's allocator, parsed; one that a race chooses stays `auto`."""
        if cell.allocator == AUTO or cell.allocator in self.plans:
            return {}
        known, own = registry_of(cell.allocator).options(cell.allocator), self.recipe(cell)
        given = {**(own.options if own.allocator == cell.allocator else {}), **self.options}
        return configure(cell.allocator, {k: v for k, v in given.items() if k in known})

    def raced(self, cell: Cell) -> bool:
        """Whether a race decides the cell's plan."""
        return is_raced(cell.allocator, self.allocator_options(cell))

    def columns(self, cell: Cell) -> tuple[str, ...]:
        """The metrics that a cell's allocator reads."""
        if cell.allocator in ON_MODEL:
            return automatic.needs(cell.allocator, cell.criterion)
        options = {k: None if v == AUTO else v for k, v in self.allocator_options(cell).items()}
        return () if cell.allocator in self.plans else ALLOCATORS.needs(cell.allocator, options)
