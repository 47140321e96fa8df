"""auto: the sparsities of all layers that cost least together, by measured error curves of the criterion that prunes.

The table's column `error_curve:CRITERION` says what each layer's pruning alone costs the model at every sparsity (`billhook.error_curves`).
Losses are added, each curve is replaced by its lower convex hull, and the sum is minimized under the budget: weights are removed
where the next one costs least, hull segment by hull segment, which is the exact optimum of the hulls (Lagrange). `strength` goes from
uniform (0) to that optimum (1). It does not know how layers pruned together interact: `billhook prune --allocator auto` therefore
tries several strengths, uniform and a published allocation on held-out text, and takes the best.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter

from billhook.criteria import CRITERIA
from billhook.errors import BillhookError
from billhook.registry import method
from billhook.table import Table

CEILING = 0.95  # no layer loses more, unless the target itself is above


@method(paper="Billhook", needs=lambda criterion, **_: (f"error_curve:{criterion}",))
def auto(table: Table, target: float, *, criterion: str = "admm", strength: float = 1.0) -> dict[str, float]:
    """s = target + strength * (optimum - target); reads the curves of `criterion`, values at even steps from 0 to 1."""
    if not 0 <= strength <= 1:
        raise BillhookError(f"strength must be in [0, 1], got {strength:g} (0 is uniform).")
    CRITERIA.check(criterion)
    curves = table.curve(f"error_curve:{criterion}")
    best = cheapest(curves, [row.n for row in table], target, max(CEILING, target))
    return {row.layer: target + strength * (s - target) for row, s in zip(table, best, strict=True)}


def cheapest(curves: Sequence[Sequence[float]], n: Sequence[int], target: float, ceiling: float = 1.0) -> list[float]:
    """Minimize the sum of the curves' lower convex hulls at s_l <= `ceiling`, with the n-weighted mean of s_l equal to `target`."""
    segments = []
    for layer, curve in enumerate(curves):
        for (a, x), (b, y) in _hull(curve, ceiling):
            segments.append(((y - x) / ((b - a) * n[layer]), layer, a, b))
    shares, left = [0.0] * len(curves), target * sum(n)
    for _, group in groupby(sorted(segments), key=itemgetter(0)):  # equal prices share what is left, so that equal layers lose the same
        tied = list(group)
        room = sum((b - a) * n[layer] for _, layer, a, b in tied)
        part = min(1.0, left / room)
        for _, layer, a, b in tied:
            shares[layer] += part * (b - a)
        left -= part * room
        if left <= 0:
            break
    return shares


def _hull(curve: Sequence[float], ceiling: float) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The segments of a curve's lower convex hull on [0, ceiling], from the left."""
    steps = len(curve) - 1
    points = [(k / steps, value) for k, value in enumerate(curve) if k / steps < ceiling]
    k = min(int(ceiling * steps), steps - 1)
    points.append((ceiling, curve[k] + (curve[k + 1] - curve[k]) * (ceiling * steps - k)))
    hull: list[tuple[float, float]] = []
    for s, value in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (s - hull[-1][0]) >= (value - hull[-1][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((s, value))
    return list(pairwise(hull))
