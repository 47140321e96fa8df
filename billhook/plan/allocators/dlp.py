"""DLP: blocks whose typical Wanda score is large lose more.

Chen et al., "DLP: Dynamic Layerwise Pruning in Large Language Models", ICML 2025, arXiv:2505.23807. The median score of
a block is taken as its *un*importance: what matters stands out from the rest, it does not raise the rest. The window is
that of OWL, of total width 2 alpha. It does not know why scores differ between blocks, and scores grow with the
residual stream.
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
    """s_i = S - (u_i' - mean u'),  u_i = 1 - score_i / sum score,  u' = u mapped to [0, 2 alpha], over blocks i.

    u is the relative importance. `statistic="mean"` is the published code, `median` the paper. Sparsities are clipped
    to [0, 1] and a constant restores the parameter-weighted mean. Equal scores give the uniform plan.
    """
    if not 0 <= alpha <= 0.5:
        raise BillhookError(
            f"DLP's alpha must be in [0, 0.5], got {alpha:g} (the paper uses 0.15 at 70 %, 0.1 at 60 %, 0.04 at 50 %)."
        )
    raw = [x * 2 * alpha for x in min_max(table.column(f"wanda_{statistic}"))]  # 1 - score / sum, turned round twice
    return dict(zip(table.shapes, shift_to(raw, [row.n for row in table], target), strict=True))
