"""AlphaPruning: layers with a heavier spectral tail (smaller alpha) are better trained and lose less.

Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", NeurIPS 2024, arXiv:2410.10912. The metric is mapped linearly to relative sparsities in [1 - epsilon,
1 + epsilon] and scaled to the target (epsilon is what their code calls it). It does not know whether the differences in
alpha are signal or noise: on models with few, similar blocks the min-max map turns noise into a wide range of
sparsities.
"""

from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.budget import min_max, scale_to
from billhook.plan.metrics import sign
from billhook.plan.table import Table
from billhook.registry import method

OWN_SHARE = 0.5  # of a layer's deviation from its block's mean, in the mixed mapping


@method(paper="Lu et al. 2024, arXiv:2410.10912", needs=lambda metric, **_: (metric,))
def alphapruning(
    table: Table,
    target: float,
    *,
    metric: str = "alpha_peak",
    epsilon: float = 0.3,
    mapping: Literal["block", "layer", "mixed"] = "block",
) -> dict[str, float]:
    """r_l = (q_l - min q) / (max q - min q) * 2 epsilon + (1 - epsilon);  s_l = min(1, c * r_l) with mean S.

    `mapping="block"` first replaces the metric by its plain mean over the block's layers (the published default).
    `mixed` takes the mean of the layer's own metric and its block's. The paper names a mixed scheme without a formula
    that could be found: this one is ours. The published formula lets s_l exceed 1; here it is clipped and the budget
    restored. Equal metrics give the uniform plan.
    """
    if not 0 <= epsilon <= 1:
        raise BillhookError(
            f"AlphaPruning's epsilon must be in [0, 1], got {epsilon} (0 is uniform; the papers use 0.1 to 0.5)."
        )
    q = {row.layer: sign(metric) * value for row, value in zip(table, table.column(metric), strict=True)}
    if mapping != "layer":
        own = OWN_SHARE if mapping == "mixed" else 0.0
        for rows in table.blocks().values():
            average = sum(q[row.layer] for row in rows) / len(rows)
            q.update({row.layer: average + own * (q[row.layer] - average) for row in rows})
    raw = [x * 2 * epsilon + (1 - epsilon) for x in min_max(list(q.values()))]
    return dict(zip(q, scale_to(raw, [row.n for row in table], target), strict=True))
