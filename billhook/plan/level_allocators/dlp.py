"""DLP for levels: blocks whose typical Wanda score is large keep fewer bits.

Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", ICML 2025, arXiv:2505.23807. The paper is about
sparsities; this is its window, in bits:

    score_i = mean (published code) or median (paper) of |W| · ‖X‖ over block i
    b_i     = (max score − score_i) / (max score − min score) · 2α + c,   c such that the bits meet the budget

The window is 2α bits wide (the option `alpha`). The bits are rounded to types so that the budget is spent.

Limits: scores also grow with the residual stream, which says nothing about importance.
"""

from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.budget import min_max
from billhook.plan.level_allocators.rounding import nearest_types
from billhook.plan.levels import Levels, Types
from billhook.registry import method


@method(paper="Chen et al. 2025, arXiv:2505.23807", needs=lambda statistic, **_: (f"wanda_{statistic}",))
def dlp(levels: Levels, *, alpha: float = 0.5, statistic: Literal["mean", "median"] = "mean") -> Types:
    """Return types near (1 - u_i) 2 alpha + c bits for the layers of block i, u the score mapped to [0, 1].

    `alpha` is half the width of the window in bits, in [0, 8]; `statistic="mean"` is the published code, `median` the
    paper.
    """
    if not 0 <= alpha <= 8:
        raise BillhookError(f"DLP's alpha must be in [0, 8] bits, got {alpha:g}.")
    raw = [-x * 2 * alpha for x in min_max(levels.table.column(f"wanda_{statistic}"))]
    return nearest_types(levels, dict(zip(levels.table.shapes, raw, strict=True)), "differences")
