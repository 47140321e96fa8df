"""Allocators: functions `(table, target, *, options) -> {layer: sparsity}`. Arithmetic on a table; no model, no
torch."""

import math
from collections.abc import Mapping
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.budget import whole_numbers
from billhook.plan.densities import of_weights, shown
from billhook.plan.plan import Pattern, SparsityPlan, check_target
from billhook.plan.table import Table
from billhook.registry import Registry

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
)
AUTO = "auto"  # as an allocator or a hyperparameter: chosen by trials on the model (`billhook.racing`)


def allocate(
    table: Table,
    sparsity: float | None,
    *,
    allocator: str = "uniform",
    pattern: str | Pattern = "unstructured",
    **options: Any,
) -> SparsityPlan:
    """Decide how much each layer of `table` loses.

    `sparsity` is the parameter-weighted mean to reach, in [0, 1); with an N:M pattern it may be None and must otherwise
    be 1 - N/M. `options` are the allocator's own (numbers, or strings as typed on a command line). An allocator that
    gives layers different sparsities gives them, under N:M, different N with the same M, whose average is the pattern's
    N (largest remainder). Raises BillhookError for an unknown allocator or option, an illegal value, or a column the
    table lacks.
    """
    if allocator == AUTO or AUTO in options.values():
        raise BillhookError(
            "auto tries plans on a model: use it with billhook prune, search or compare. From a table alone, allocate "
            "with curves, or give the option's value."
        )
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    target = check_budget(sparsity, pattern)
    configured = ALLOCATORS.configure(allocator, options)
    shares = ALLOCATORS.get(allocator)(table, target, **configured)
    if pattern.structured:
        shares = _whole_groups(table, shares, pattern)
    made_by = {
        "allocator": allocator,
        "options": configured,
        "paper": ALLOCATORS.paper(allocator),
        "model": table.model,
    }
    read = [name for name in ALLOCATORS.needs(allocator, configured) if name in table.columns()]
    made_by["metrics"] = {name: dict(zip(table.shapes, table.column(name), strict=True)) for name in read}
    if any(map(of_weights, read)) and (spectra := shown(table)):
        made_by["spectra"] = spectra
    plan = SparsityPlan(target, pattern, shares, made_by)
    plan.check(table.shapes)
    achieved = math.fsum(shares[row.layer] * row.n for row in table) / table.total
    assert abs(achieved - target) < 1e-9 or pattern.structured, (achieved, target)
    return plan


def check_budget(sparsity: float | None, pattern: Pattern) -> float:
    """The global sparsity meant by `sparsity` and `pattern` together; raises BillhookError when they disagree or it is
    missing."""
    if not pattern.structured:
        if sparsity is None:
            raise BillhookError("Say how much to remove: --sparsity 0.5 removes half of the weights.")
        return check_target(sparsity)
    implied = 1 - pattern.keep / pattern.of  # type: ignore[operator]
    if sparsity is not None and abs(check_target(sparsity) - implied) > 1e-6:
        raise BillhookError(
            f"Pattern {pattern} keeps {pattern.keep} of every {pattern.of}: its sparsity is {implied:g}, not "
            f"{sparsity:g}."
        )
    return implied


def _whole_groups(table: Table, shares: Mapping[str, float], pattern: Pattern) -> dict[str, float]:
    """Round each layer's sparsity to a multiple of 1/of, keeping the total as near the budget as layer sizes allow."""
    of = pattern.of
    assert of is not None
    removed = whole_numbers(
        [of * shares[row.layer] for row in table], [of] * len(table.rows), [row.n / of for row in table]
    )
    return {row.layer: k / of for row, k in zip(table, removed, strict=True)}
