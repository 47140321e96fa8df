"""Allocators of levels: `(levels, *, options) -> {tensor: storage type}` under a budget in bytes. No torch."""

from typing import Any

from billhook.errors import BillhookError
from billhook.plan.levels import Levels
from billhook.plan.plan import Plan
from billhook.registry import Registry

ERRORS, WEIGHTS = "level_errors", "level_weights"  # what an allocator reads beside columns of the table
LEVEL_ALLOCATORS = Registry(
    "level allocator",
    {
        "curves": "billhook.plan.level_allocators.curves:curves",
        "uniform": "billhook.plan.level_allocators.uniform:uniform",
        "alphapruning": "billhook.plan.level_allocators.alphapruning:alphapruning",
        "alphaq": "billhook.plan.level_allocators.alphaq:alphaq",
        "atp": "billhook.plan.level_allocators.atp:atp",
        "owl": "billhook.plan.level_allocators.owl:owl",
        "dlp": "billhook.plan.level_allocators.dlp:dlp",
    },
    plugins=True,
)


def allocate_levels(levels: Levels, allocator: str = "curves", **options: Any) -> Plan:
    """The plan of storage types that an allocator makes from `levels`.

    `options` are the allocator's (numbers, or strings as on the command line). Raises BillhookError for an unknown
    allocator or option, an illegal value, a missing column, and a budget that is below the smallest types.
    """
    configured = LEVEL_ALLOCATORS.configure(allocator, options)
    if levels.least > levels.budget:
        raise BillhookError(f"The least possible is {levels.least:,} bytes, and {levels.budget:,} were asked for.")
    types = LEVEL_ALLOCATORS.get(allocator)(levels, **configured)
    assert levels.total(types) <= levels.budget, (allocator, levels.total(types), levels.budget)
    paper = LEVEL_ALLOCATORS.paper(allocator)
    made_by: dict[str, Any] = {"allocator": allocator, "options": configured, "paper": paper, **levels.recorded()}
    read = [name for name in LEVEL_ALLOCATORS.needs(allocator, configured) if name in levels.table.columns()]
    if read:
        shapes = levels.table.shapes
        made_by["metrics"] = {name: dict(zip(shapes, levels.table.column(name), strict=True)) for name in read}
    return levels.plan(types, made_by)
