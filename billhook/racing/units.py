"""How many parts each unit keeps: the optimum of measured curves, tried on held-out text against the uniform plan.

As `billhook.racing.automatic` for sparsities. A unit is a row of the table; its curve is the error that the structured
method leaves when the unit alone becomes smaller (`billhook.measurement.unit_curves`), and its share of the divergence
is measured under each plan. In a uniform shape only the split between kinds of units is chosen: the curves of all units
of a kind are added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from billhook.engine.walk import Progress
from billhook.measurement.unit_curves import unit_curves
from billhook.plan.allocators import ALLOCATORS, AUTO
from billhook.plan.allocators.curves import MIDDLE, at
from billhook.plan.plan import Budget, Plan
from billhook.plan.table import Row, Table
from billhook.plan.unit_counts import Shape, Size, per_layer_counts, shares_of, uniform_counts
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.racing.automatic import ErrorCurves, rounds
from billhook.racing.race import AllocationProblem, Candidate, Race
from billhook.trials.unit_trials import UnitRunner


@dataclass(frozen=True)
class UnitProblem(AllocationProblem):
    """What plans of units are made from: `sizes` of the units, of which `remove` parameters go, and the `shape`.

    The rows of the table are units; `stays` is what stays in all blocks.
    """

    sizes: Sequence[Size] = ()
    remove: int = 0
    shape: Shape = "uniform"
    stays: int = 1

    def allocate(self, allocator: str, options: Mapping[str, Any]) -> Plan:
        """The plan of an allocator on the table."""
        assert self.sparsity is not None
        table = _by_kind(self.table, options) if allocator == "curves" and self.shape == "uniform" else self.table
        found = ALLOCATORS.get(allocator)(table, self.sparsity, **ALLOCATORS.configure(allocator, options))
        fractions = {s.name: found.get(s.name, found.get(s.kind, 0.0)) for s in self.sizes}
        return self.plan(fractions, allocator, options)

    def plan(self, fractions: Mapping[str, float], allocator: str, options: Mapping[str, Any]) -> Plan:
        """The plan in which each unit loses about this fraction."""
        shares = shares_of(self.sizes, fractions)
        if self.shape == "uniform":
            counts = uniform_counts(self.sizes, self.remove, shares)
        else:
            counts = per_layer_counts(self.sizes, self.remove, fractions)
        about = {**options, "shape": self.shape, "shares": shares}
        registry = MODEL_ALLOCATORS if allocator in MODEL_ALLOCATORS.names() else ALLOCATORS
        made_by = {"allocator": allocator, "options": about, "paper": registry.paper(allocator)}
        return Plan(Budget("parameters", self.stays), {}, counts, made_by)


def _by_kind(table: Table, options: Mapping[str, Any]) -> Table:
    """A table with a row for each kind, whose losses are the sums over the units of the kind."""
    curve, share = f"error_curve:{options['criterion']}", f"loss_share:{options['criterion']}"
    rows = []
    for kind in dict.fromkeys(row.kind for row in table):
        units = [row for row in table if row.kind == kind]
        scaled = [[row.metrics[share] * e / at(row.curves[curve], MIDDLE) for e in row.curves[curve]] for row in units]
        summed = [sum(column) for column in zip(*scaled, strict=True)]
        whole = tuple(value / summed[-1] for value in summed)
        shape = (1, sum(row.n for row in units))
        shares = {share: sum(row.metrics[share] for row in units)}
        rows.append(Row(kind, 0, kind, shape, shares, {curve: whole}))
    return replace(table, rows=tuple(rows))


class UnitCurves(ErrorCurves):
    """Plans of units from their curves; `problem` is a `UnitProblem`."""

    def removed(self, plan: Plan) -> Mapping[str, float]:
        """The fraction that a plan removes of each unit."""
        assert isinstance(self.problem, UnitProblem)
        return {s.name: 1 - plan.units[s.name] / s.count for s in self.problem.sizes}


def choose_counts(
    runner: UnitRunner,
    problem: UnitProblem,
    facts: Mapping[str, Any],
    *,
    trials: bool = True,
    progress: Progress = lambda line: None,
) -> Plan:
    """The best plan on the held-out rows of `runner`, never worse than the uniform one there.

    `problem` has an empty table; `facts` go into the plan's record of trials. Without `trials`, the first optimum of
    the curves is returned untried.
    """
    criterion = runner.removal.method
    found, sizes = unit_curves(runner, progress), {s.name: s for s in problem.sizes}
    rows = []
    for unit in runner.units:
        curve = {f"error_curve:{criterion}": tuple(found[unit.name])}
        rows.append(Row(unit.name, unit.block, unit.kind, (unit.count, sizes[unit.name].parameters), {}, curve))
    curves = UnitCurves(replace(problem, table=Table(tuple(rows))), criterion)
    race = Race(runner, progress=progress)
    if not trials:
        race.run(lambda race: iter([Candidate("uniform", curves.uniform, attribute=True)]))
        return curves.optimum(curves.shares(race, "uniform"))
    race.run(lambda race: rounds(curves, race))
    best = race.result(facts)
    return replace(best, made_by={**best.made_by, "allocator": AUTO})
