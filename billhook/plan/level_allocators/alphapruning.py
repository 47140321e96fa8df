"""AlphaPruning for levels: blocks whose weight spectra have heavier tails keep more bits.

Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", NeurIPS 2024, arXiv:2410.10912, which reports mixed precision without formula or constants. This is
the map for sparsities (section 3.2), reversed:

    q_l = mean of alpha over the layers of l's block                    (mapping=block)
    r_l = (max q − q_l) / (max q − min q) · 2ε + (1 − ε)
    b_l = c · r_l,   c such that the bits meet the budget

A small alpha means a heavy tail, the mark of a well-trained layer, which keeps more. The bits b_l are rounded to types
so that the budget is spent (largest remainder). ε is the option `epsilon`: the ratio of the largest and the smallest
bits is (1 + ε) / (1 − ε).

Limits: as for sparsities, the min-max map turns noise into a wide range where blocks are few and alike.

Measured: KL divergence .0435 against .0575 for one type everywhere and .0302 for `curves` (a model of 5 blocks, 3.25
bits a weight).
"""

from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.budget import min_max
from billhook.plan.level_allocators.rounding import nearest_types
from billhook.plan.levels import Levels, Types
from billhook.plan.metrics import fact
from billhook.registry import method


@method(paper="Lu et al. 2024, arXiv:2410.10912", needs=lambda metric, **_: (metric,))
def alphapruning(
    levels: Levels, *, metric: str = "alpha_peak", epsilon: float = 0.3, mapping: Literal["block", "layer"] = "block"
) -> Types:
    """Return types near c * r_l bits, r_l being the metric mapped linearly to [1 + epsilon, 1 - epsilon].

    `mapping="block"` first replaces the metric by its mean over the block's layers. Metrics with the opposite sign (see
    `billhook ls metrics`) are mapped the other way round.
    """
    if not 0 <= epsilon < 1:
        raise BillhookError(f"AlphaPruning's epsilon must be in [0, 1), got {epsilon} (the papers use 0.1 to 0.5).")
    table = levels.table
    q = {row.layer: fact(metric).sign * value for row, value in zip(table, table.column(metric), strict=True)}
    if mapping == "block":
        for rows in table.blocks().values():
            q.update(dict.fromkeys((row.layer for row in rows), sum(q[row.layer] for row in rows) / len(rows)))
    raw = [(1 - x) * 2 * epsilon + (1 - epsilon) for x in min_max(list(q.values()))]
    return nearest_types(levels, dict(zip(q, raw, strict=True)), "ratios")
