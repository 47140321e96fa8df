"""Uniform: every layer loses the same fraction. The baseline that every other allocation has to beat."""

from billhook.plan.table import Table
from billhook.registry import method


@method(paper="the common baseline")
def uniform(table: Table, target: float) -> dict[str, float]:
    """s_l = S."""
    return {row.layer: target for row in table}
