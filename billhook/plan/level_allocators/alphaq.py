"""AlphaQ: bits for layers with heavy-tailed spectra and large weights, by the noise that rounding adds.

AlphaQ, arXiv:2606.04980.

    minimize Σ_l (median α / α_l)^γ · Var(W_l) · 4^(−b_l)   under the budget

Each bit divides the squared rounding error by four, and the error of a layer counts as its weights' variance, more
where the tail exponent α_l is small. The types that minimize the sum are found exactly, with the bits that they really
take. Exponents are those of FARMS, `alpha_farms`, which do not depend on a layer's shape; γ is 1.

Differences from the paper: the types are those of the file that is written, not 2, 3 and 4 bits in groups of 128; the
variance is the mean square of the weights, whose mean is next to zero. Embeddings and head get the types of `uniform`.

Limits: neither the activations nor the place in the model count.
"""

import statistics

from billhook.errors import BillhookError
from billhook.plan.knapsack import choose_levels
from billhook.plan.level_allocators.rounding import layer_groups, raised
from billhook.plan.level_allocators.uniform import uniform
from billhook.plan.levels import Levels, Types
from billhook.registry import method


@method(paper="AlphaQ 2026, arXiv:2606.04980", needs=lambda metric, **_: (metric, "frobenius_sq"))
def alphaq(levels: Levels, *, metric: str = "alpha_farms", gamma: float = 1.0) -> Types:
    """Return the types with the least sum of (median / alpha)^gamma * variance * 4^-bits.

    Raises BillhookError for exponents that are not positive.
    """
    table = levels.table
    alphas = dict(zip(table.shapes, table.column(metric), strict=True))
    variances = {row.layer: x / row.n for row, x in zip(table, table.column("frobenius_sq"), strict=True)}
    if min(alphas.values()) <= 0 or not -10 <= gamma <= 10:
        raise BillhookError(f"AlphaQ needs a positive {metric} of every layer and gamma in [-10, 10], got {gamma:g}.")
    median = statistics.median(alphas.values())
    importance = {name: (median / alpha) ** gamma * variances[name] for name, alpha in alphas.items()}
    groups, left = layer_groups(levels)
    ladders = [levels.ladder(group) for group in groups]
    losses = [
        [sum(importance[name] for name in g) * 4.0 ** (-8 * size / levels.weights_in(g)) for size, _ in ladder]
        for g, ladder in zip(groups, ladders, strict=True)
    ]
    chosen = choose_levels([[size for size, _ in ladder] for ladder in ladders], losses, left)
    found = {name: ladder[k][1] for g, ladder, k in zip(groups, ladders, chosen, strict=True) for name in g}
    return raised(levels, uniform(levels) | found, {})
