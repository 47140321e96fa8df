"""Allocators: functions `(table, target, *, options) -> {layer: sparsity}`, without model and torch."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from billhook.errors import BillhookError
from billhook.plan.budget import whole_numbers
from billhook.plan.densities import of_weights, shown
from billhook.plan.plan import Plan, check_target
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.registry import Registry

AUTO = "auto"  # an allocator, or a value of an option, that is chosen by trials on the model (`billhook.racing`)
RCO = "rco"  # an allocator that needs the model, too
ON_MODEL = (RCO, AUTO)
ALLOCATORS = Registry(
    "allocator",
    {
        "uniform": "billhook.plan.allocators.uniform:uniform",
        "alphapruning": "billhook.plan.allocators.alphapruning:alphapruning",
        "atp": "billhook.plan.allocators.atp:atp",
        "owl": "billhook.plan.allocators.owl:owl",
        "dlp": "billhook.plan.allocators.dlp:dlp",
        "er": "billhook.plan.allocators.er:er",
        "lamp": "billhook.plan.allocators.lamp:lamp",
        "global": "billhook.plan.allocators.one_threshold:one_threshold",
        "sensitivity": "billhook.plan.allocators.sensitivity:sensitivity",
        "curves": "billhook.plan.allocators.curves:curves",
        "explicit": "billhook.plan.allocators.explicit:explicit",
    },
    plugins=True,
    beside=ON_MODEL,
)
BudgetScope = Literal["each", "joint"]
_WHOLE = ("explicit",)  # allocators that must see all stacks


def allocate(
    table: Table,
    sparsity: float | None,
    *,
    allocator: str = "uniform",
    pattern: str | Pattern = "unstructured",
    budget: BudgetScope = "each",
    **options: Any,
) -> Plan:
    """The plan that an allocator makes from `table`.

    `sparsity` is the parameter-weighted mean, in [0, 1); with an N:M pattern, None or 1 - N/M. `options` are the
    allocator's (numbers, or strings as on the command line). Of a table with several stacks of blocks (a vision tower
    and a decoder) `each` meets the sparsity; with the budget `joint` they share it. Under N:M, layers get different N
    with the same M, whose mean is the pattern's N (largest remainder). Raises BillhookError for an unknown allocator or
    option, an illegal value, or a missing column.
    """
    if allocator in ON_MODEL or AUTO in options.values():
        name = allocator if allocator in ON_MODEL else AUTO
        raise BillhookError(f"{name} tries plans on a model (billhook prune). From a table, allocate with curves.")
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    target = check_budget(sparsity, pattern)
    configured = ALLOCATORS.configure(allocator, options)
    parts = parts_of(table, "joint" if allocator in _WHOLE else budget)
    made = [ALLOCATORS.get(allocator)(part, target, **configured) for part in parts]
    shares = {row.layer: share[row.layer] for row in table for share in made if row.layer in share}
    paper = ALLOCATORS.paper(allocator)
    made_by = {"allocator": allocator, "options": configured, "paper": paper, "model": table.model}
    read = [name for name in ALLOCATORS.needs(allocator, configured) if name in table.columns()]
    made_by["metrics"] = {name: dict(zip(table.shapes, table.column(name), strict=True)) for name in read}
    if any(map(of_weights, read)) and (spectra := shown(table)):
        made_by["spectra"] = spectra
    return plan_of(table, shares, target, pattern, made_by)


def parts_of(table: Table, budget: BudgetScope) -> list[Table]:
    """The parts of a table that each meet the sparsity: every stack of blocks, or all of them together."""
    return table.stacks() if budget == "each" else [table]


def plan_of(
    table: Table, shares: Mapping[str, float], target: float, pattern: Pattern, made_by: Mapping[str, Any]
) -> Plan:
    """The plan of each layer's sparsity, whose parameter-weighted mean is `target`, rounded to N:M."""
    if pattern.structured:
        shares = _whole_groups(table, shares, pattern)
    plan = Plan.of_sparsities(target, pattern, shares, made_by)
    plan.check(table.shapes)
    achieved = math.fsum(shares[row.layer] * row.n for row in table) / table.total
    assert abs(achieved - target) < 1e-9 or pattern.structured, (achieved, target)
    return plan


def check_budget(sparsity: float | None, pattern: Pattern) -> float:
    """The global sparsity by `sparsity` and `pattern`; raises BillhookError if they disagree or both leave it open."""
    if not pattern.structured:
        if sparsity is None:
            raise BillhookError("Say how much to remove: --sparsity 0.5 removes half of the weights.")
        return check_target(sparsity)
    implied = pattern.sparsity
    if sparsity is not None and abs(check_target(sparsity) - implied) > 1e-6:
        raise BillhookError(
            f"{pattern} keeps {pattern.keep} of every {pattern.of}: its sparsity is {implied:g}, not {sparsity:g}."
        )
    return implied


def _whole_groups(table: Table, shares: Mapping[str, float], pattern: Pattern) -> dict[str, float]:
    """Round each layer's sparsity to a multiple of 1/M, with the total as near the budget as layer sizes allow."""
    of = pattern.of
    assert of is not None
    exact, weights = [of * shares[row.layer] for row in table], [row.n / of for row in table]
    removed = whole_numbers(exact, [of] * len(exact), weights)
    return {row.layer: k / of for row, k in zip(table, removed, strict=True)}
