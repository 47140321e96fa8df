"""Choose one level for each of several groups so that the summed loss is least and the summed cost within a budget.

The multiple-choice knapsack problem, solved by dynamic programming over the cost in units of a common divisor. Where
there would be more than `UNITS` units, costs are rounded up to a coarser unit, and what remains of the budget is spent
on the levels that lower the loss most for what they cost.
"""

import math
from collections.abc import Sequence

from billhook.errors import BillhookError

UNITS = 20_000


def choose_levels(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The index of the level of each group; `costs` are whole numbers above 0, `losses` finite.

    Raises BillhookError where even the cheapest levels cost more than `budget`.
    """
    cheapest = [c.index(min(c)) for c in costs]
    base = sum(c[i] for c, i in zip(costs, cheapest, strict=True))
    if base > budget:
        raise BillhookError(f"The least possible is {base:,} bytes, and {budget:,} were asked for.")
    extra = [[x - c[i] for x in c] for c, i in zip(costs, cheapest, strict=True)]
    divisor = math.gcd(*(x for group in extra for x in group)) or 1
    room = min(budget - base, sum(map(max, extra)))
    unit = divisor * -(-(room // divisor) // UNITS) if room >= divisor else divisor
    chosen = _dynamic([[-(-x // unit) for x in group] for group in extra], losses, room // unit)
    return _spend_rest(costs, losses, chosen, budget)


def _dynamic(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], units: int) -> list[int]:
    """The best levels for costs in units; every group has one that costs nothing."""
    import numpy as np  # takes 0.1 s, which listing and planning do not need

    best = np.zeros(units + 1)
    picked = np.zeros((len(costs), units + 1), dtype=np.int16)
    for group, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        table = np.full(units + 1, np.inf)
        for level, (c, value) in enumerate(zip(cost, loss, strict=True)):
            if c > units:
                continue
            tried = best[: units + 1 - c] + value
            better = tried < table[c:]
            table[c:][better] = tried[better]
            picked[group, c:][better] = level
        best = table
    left, chosen = units, [0] * len(costs)
    for group in range(len(costs) - 1, -1, -1):
        chosen[group] = int(picked[group, left])
        left -= costs[group][chosen[group]]
    return chosen


def _spend_rest(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], chosen: list[int], budget: int
) -> list[int]:
    """Raise levels while the budget allows it, the largest gain per cost first."""
    chosen = list(chosen)
    left = budget - sum(c[i] for c, i in zip(costs, chosen, strict=True))
    while True:
        steps = [
            ((losses[g][chosen[g]] - losses[g][i]) / max(costs[g][i] - costs[g][chosen[g]], 1e-9), g, i)
            for g in range(len(costs))
            for i in range(len(costs[g]))
            if costs[g][i] - costs[g][chosen[g]] <= left and losses[g][i] < losses[g][chosen[g]]
        ]
        if not steps:
            return chosen
        _, group, level = max(steps)
        left -= costs[group][level] - costs[group][chosen[group]]
        chosen[group] = level
