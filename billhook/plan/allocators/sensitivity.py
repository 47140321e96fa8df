"""Sensitivity: blocks that hurt more when they alone are pruned lose less.

The map is AlphaPruning's, over the logarithm of the measured rise of the loss (column `block_loss:TRIAL`), because
rises differ by orders of magnitude and one sensitive block would leave all others alike. The idea is old (Han et al.
2015 scanned layers one by one). It does not know how errors of blocks pruned together add up.
"""

import math

from billhook.errors import BillhookError
from billhook.plan.budget import min_max, scale_to
from billhook.plan.table import Table
from billhook.registry import method

NOISE = 1e-3  # a rise of the loss by less than a thousandth says nothing


@method(paper="Han et al. 2015, arXiv:1506.02626", needs=lambda trial, **_: (f"block_loss:{trial:g}",))
def sensitivity(table: Table, target: float, *, epsilon: float = 0.2, trial: float = 0.6) -> dict[str, float]:
    """q_i = -ln max(rise_i, 0.001);  r_i = min-max of q to [1 - epsilon, 1 + epsilon];  s_i = min(1, c r_i) with mean
    S.

    `trial` is the sparsity at which each block was tried alone; near the target is best.
    """
    if not 0 <= epsilon <= 1:
        raise BillhookError(f"epsilon must be in [0, 1], got {epsilon:g} (0 is uniform).")
    rises = table.column(f"block_loss:{trial:g}")
    raw = [x * 2 * epsilon + (1 - epsilon) for x in min_max([-math.log(max(rise, NOISE)) for rise in rises])]
    return dict(zip(table.shapes, scale_to(raw, [row.n for row in table], target), strict=True))
