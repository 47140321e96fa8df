"""Curves: the sparsities with the smallest sum of measured losses, for the criterion that prunes.

    loss_l(s) = share_l · e_l(s) / e_l(0.6)
    optimum   = argmin Σ_l loss_l(s_l),   Σ n_l s_l = S Σ n_l,   s_l ≤ 0.95
    s_l       = S + strength · (optimum_l − S)

e_l(s) is the relative error of layer l's output, pruned alone to s: the column `error_curve:CRITERION`. share_l is what
the layer's error cost the model when all layers were pruned to 0.6: the column `loss_share:CRITERION`. Both can be
measured and used separately: `billhook measure MODEL --metrics error_curve:admm,loss_share:admm --calibration SOURCE`.

Each loss is replaced by its lower convex hull. Hull segments are taken in the order of their slope per weight until the
budget is spent, which is the exact optimum of the hulls (Lagrange). A negative share counts as zero.

Cost: the pruning of one small part of each layer at four sparsities, one pruning of the model in memory, and one
backward pass.

Limits: it does not know how the shares change when the plan does. `auto` measures them again under the plan, and scores
the result on held-out text.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter

from billhook.errors import BillhookError
from billhook.plan.table import Table
from billhook.registry import method

CEILING = 0.95  # the largest sparsity of a layer, unless the target is above it
LEAST = 1e-12  # relative error
MIDDLE = 0.6  # the sparsity of every layer where `loss_share` is measured


@method(paper="Billhook", needs=lambda criterion, **_: (f"error_curve:{criterion}", f"loss_share:{criterion}"))
def curves(table: Table, target: float, *, criterion: str = "admm", strength: float = 1.0) -> dict[str, float]:
    """Return S + strength * (optimum - S) for every layer; reads the error curves and shares of `criterion`.

    `strength` interpolates between the uniform plan (0) and the optimum (1).
    """
    if not 0 <= strength <= 1:
        raise BillhookError(f"strength must be in [0, 1], got {strength:g} (0 is uniform).")
    errors = [[min(max(e, 0.0), 1.0) for e in curve] for curve in table.curve(f"error_curve:{criterion}")]
    shares = table.column(f"loss_share:{criterion}")
    whole = max(*shares, 1e-300)
    losses = [
        [max(share, 0.0) / whole * e / max(at(curve, MIDDLE), LEAST) for e in curve]
        for curve, share in zip(errors, shares, strict=True)
    ]
    best = cheapest(losses, [row.n for row in table], target, max(CEILING, target))
    return {row.layer: target + strength * (s - target) for row, s in zip(table, best, strict=True)}


def at(curve: Sequence[float], s: float) -> float:
    """The value at sparsity `s`, interpolated linearly, of a curve given at even steps from 0 to 1."""
    steps = len(curve) - 1
    k = min(int(s * steps), steps - 1)
    return curve[k] + (curve[k + 1] - curve[k]) * (s * steps - k)


def cheapest(curves: Sequence[Sequence[float]], n: Sequence[int], target: float, ceiling: float = 1.0) -> list[float]:
    """Return the s_l that minimize the sum of the curves' lower convex hulls, with s_l <= `ceiling` and n-weighted mean
    `target`.
    """
    segments = []
    for layer, curve in enumerate(curves):
        for (a, x), (b, y) in _hull(curve, ceiling):
            segments.append(((y - x) / ((b - a) * n[layer]), layer, a, b))
    shares, left = [0.0] * len(curves), target * sum(n)
    for _, group in groupby(sorted(segments), key=itemgetter(0)):
        tied = list(group)  # segments of equal slope share what is left, so that equal layers get equal sparsities
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
    points.append((ceiling, at(curve, ceiling)))
    hull: list[tuple[float, float]] = []
    for s, value in points:
        while len(hull) > 1:
            (a, x), (b, y) = hull[-2:]
            if (y - x) * (s - b) < (value - y) * (b - a):
                break
            hull.pop()
        hull.append((s, value))
    return list(pairwise(hull))
