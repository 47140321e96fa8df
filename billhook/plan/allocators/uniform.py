"""Uniform: every layer loses the same fraction of its weights.

The common baseline. S is the target, the mean over all prunable weights.

    s_l = S

Limits: it knows nothing about the model. An allocation that does not beat it on held-out text should not be used.
"""

from billhook.plan.table import Table
from billhook.registry import method


@method(paper="the common baseline")
def uniform(table: Table, target: float) -> dict[str, float]:
    """Return S for every layer."""
    return {row.layer: target for row in table}
