"""OWL for levels: blocks with more outliers among their Wanda scores keep more bits.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", ICML
2024, arXiv:2310.05175. The paper is about sparsities; this is its window, in bits:

    D_i = 100 · fraction of the scores |W| · ‖X‖ of block i that exceed m times their mean
    b_i = (D_i − min D) / (max D − min D) · 2λ + c,   c such that the bits meet the budget

All bits lie in a window of width 2λ (the option `lam`, in bits), and are rounded to types so that the budget is spent.

Limits: with equal outlier ratios all blocks get the same bits.
"""

from billhook.errors import BillhookError
from billhook.plan.budget import min_max
from billhook.plan.level_allocators.rounding import nearest_types
from billhook.plan.levels import Levels, Types
from billhook.registry import method


@method(paper="Yin et al. 2024, arXiv:2310.05175", needs=lambda m, **_: (f"outlier_ratio:{m:g}",))
def owl(levels: Levels, *, lam: float = 0.5, m: float = 5.0) -> Types:
    """Return types near r_i + c bits for the layers of block i, with D from the column `outlier_ratio:M`.

    `lam` is half the width of the window in bits, in [0, 8]; `m` the multiple of the mean score that makes an outlier.
    """
    if not 0 <= lam <= 8:
        raise BillhookError(f"OWL's lam must be in [0, 8] bits, got {lam:g}.")
    raw = [x * 2 * lam for x in min_max(levels.table.column(f"outlier_ratio:{m:g}"))]
    return nearest_types(levels, dict(zip(levels.table.shapes, raw, strict=True)), "differences")
