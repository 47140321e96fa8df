"""DLP: blocks whose typical Wanda score is large lose more.

Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", ICML 2025, arXiv:2505.23807.

    score_i = mean (published code) or median (paper) of |W| · ‖X‖ over block i
    u_i     = 1 − score_i / Σ score,   mapped linearly from [min u, max u] to [0, 2α]
    s_i     = S − (u_i − mean u)

Scores are those of the dense model, over all layers of a block together: the columns `wanda_mean` and `wanda_median`. A
large typical score is taken as a sign of low importance, because important weights stand out from the others and do not
raise all of them. The paper's α (the option `alpha`) is 0.15 at 70 %, 0.1 at 60 % and 0.04 at 50 %: the recipes
`dlp@70`, `dlp@60` and `dlp@50`.

Differences from the published code: the mean of u is weighted by block size and clipping restores the budget; the
published mean is over blocks.

Limits: scores also grow with the residual stream, which says nothing about importance. The paper's claim that no tuning
is needed did not hold in our comparison: the default is the best published one on two models and much worse than
uniform on another.
"""

from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.budget import min_max, shift_to
from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Chen et al. 2025, arXiv:2505.23807", needs=lambda statistic, **_: (f"wanda_{statistic}",))
def dlp(
    table: Table, target: float, *, alpha: float = 0.15, statistic: Literal["mean", "median"] = "mean"
) -> dict[str, float]:
    """Return s_i = S - (u_i - mean u) for the layers of block i, with u the relative importance mapped to [0, 2 alpha].

    `statistic="mean"` is the published code, `median` the paper. Sparsities are clipped to [0, 1] and a constant
    restores the parameter-weighted mean. If all scores are equal, the plan is uniform.
    """
    if not 0 <= alpha <= 0.5:
        raise BillhookError(f"DLP's alpha must be in [0, 0.5], got {alpha:g} (the paper uses 0.04 to 0.15).")
    raw = [x * 2 * alpha for x in min_max(table.column(f"wanda_{statistic}"))]  # min-max of -u, up to a constant
    return dict(zip(table.shapes, shift_to(raw, [row.n for row in table], target), strict=True))
