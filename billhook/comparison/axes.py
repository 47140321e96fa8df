"""The axes of a comparison, and the cells of their grid."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from billhook.comparison.record import Cell
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.racing import automatic
from billhook.registry import Registry, hint


@dataclass(frozen=True)
class Grid:
    """The axes of a comparison, each a list of names or numbers, and the `options` of all methods, not parsed yet.

    `plans` (by name) are compared with the plans of the allocators, each with its own pattern and sparsity.
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
                listed = f"{hint(key, known)} Options: {', '.join(known)}."
                raise BillhookError(f"No method of this comparison has an option {key!r}.{listed}")
        list(self.budgets())

    def budgets(self) -> Iterator[tuple[str, float]]:
        """Every pattern with its sparsities, of which an N:M pattern has only one."""
        for pattern in dict.fromkeys(self.patterns):
            parsed = Pattern.parse(pattern)
            for sparsity in [None] if parsed.structured else dict.fromkeys(self.sparsities):
                yield str(parsed), check_budget(sparsity, parsed)

    def cells(self, first: int) -> Iterator[Cell]:
        """Every cell; those that read no calibration text have the `first` seed only."""
        plans = [*product(self.budgets(), dict.fromkeys(self.allocators))]
        plans += [((str(plan.pattern), plan.target), name) for name, plan in self.plans.items()]
        for ((pattern, sparsity), allocator), criterion in product(plans, dict.fromkeys(self.criteria)):
            for seed in range(self.seeds if self.reads_text(allocator, criterion) else 1):
                yield Cell(pattern, sparsity, allocator, criterion, first + seed)

    def reads_text(self, allocator: str | None = None, criterion: str | None = None) -> bool:
        """Whether calibration text is needed by an allocator and a criterion, or by any of them."""
        chosen = [c for c in self.criteria if criterion in (None, c)]
        statistics = [name for c in chosen for name in CRITERIA.needs(c, self.configure(CRITERIA, c))]
        return bool(statistics) or any(fact(name).needs_text for name in self.columns(allocator))

    def columns(self, allocator: str | None = None) -> list[str]:
        """The metrics that an allocator reads, or all of them."""
        chosen = [a for a in self.allocators if allocator in (None, a)]
        found = [name for c in self.criteria for name in automatic.needs(c)] if AUTO in chosen else []
        found += [name for a in chosen if a != AUTO for name in ALLOCATORS.needs(a, self.configure(ALLOCATORS, a))]
        return list(dict.fromkeys(found))

    def configure(self, registry: Registry, name: str) -> dict[str, Any]:
        """All options of one method, parsed."""
        known = registry.options(name)
        return registry.configure(name, {key: value for key, value in self.options.items() if key in known})
