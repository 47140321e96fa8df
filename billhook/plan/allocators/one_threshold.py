"""Global: the scores of all layers are compared with one threshold.

The classical form of magnitude pruning: Han et al., "Learning both Weights and Connections for Efficient Neural
Networks", 2015, arXiv:1506.02626.

    s_l = min(1 − floor, fraction of layer l's scores below t),   t such that the mean is S

Scores are magnitudes or Wanda scores, read as quantiles from the columns `magnitude_quantiles` and `wanda_quantiles`.
At least the fraction `floor` of every layer is kept, or 1 − S if that is less.

Limits: scores are not naturally comparable between layers. Without the floor, a layer of small weights would be removed
whole. With the default floor it was up to 50 times worse than uniform in perplexity.
"""

from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.allocators.thresholds import cut
from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Han et al. 2015, arXiv:1506.02626", needs=lambda score, **_: (f"{score}_quantiles",))
def one_threshold(
    table: Table, target: float, *, score: Literal["magnitude", "wanda"] = "magnitude", floor: float = 0.1
) -> dict[str, float]:
    """Return the fraction of each layer's scores that lies below the common threshold, at most 1 - floor.

    `score` chooses what is compared; `floor` is the fraction of every layer that is kept at least.
    """
    if not 0 <= floor < 1:
        raise BillhookError(f"floor, the least fraction kept of every layer, must be in [0, 1), got {floor:g}.")
    curves = table.curve(f"{score}_quantiles")
    return dict(zip(table.shapes, cut(curves, [row.n for row in table], target, max(1 - floor, target)), strict=True))
