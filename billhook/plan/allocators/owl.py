"""OWL: blocks with more outliers among their Wanda scores lose less.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", ICML
2024, arXiv:2310.05175.

    D_i = 100 · fraction of the scores |W| · ‖X‖ of block i that exceed m times their mean
    r_i = (D_i − min D) / (max D − min D) · 2λ
    s_i = S − (r_i − mean r)

D is measured on the dense model, over all layers of a block together: the column `outlier_ratio:M`, which needs
calibration text. All sparsities lie in a window of width 2λ (the option `lam`).

Differences from the published code:

* The mean of r is weighted by block size, so that the mean sparsity is S. The published mean is over blocks.
* Sparsities outside [0, 1] are clipped and a constant restores the mean. The published code replaces s ≤ 0 by 0.01,
  which misses the budget, and does not check for s > 1.
* m is 5 by default, as in the published commands; the published code's own default is 3.
* Under N:M, rounding keeps the budget. The published N:8 rounds each block, so the total drifts.

Measured agreement: Wanda masks under OWL equal the published ones in every weight.

Limits: if all blocks have the same outlier ratio, the plan is uniform. On barely trained models it was worse than
uniform.
"""

from billhook.errors import BillhookError
from billhook.plan.budget import min_max, shift_to
from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Yin et al. 2024, arXiv:2310.05175", needs=lambda m, **_: (f"outlier_ratio:{m:g}",))
def owl(table: Table, target: float, *, lam: float = 0.08, m: float = 5.0) -> dict[str, float]:
    """Return s_i = S - (r_i - mean r) for the layers of block i, with D from the column `outlier_ratio:M`.

    `lam` is half the width of the window of sparsities, in [0, 0.5]; `m` the multiple of the mean score that makes an
    outlier.
    """
    if not 0 <= lam <= 0.5:
        raise BillhookError(f"OWL's lam must be in [0, 0.5], got {lam} (the paper uses 0.02 to 0.2).")
    raw = [-x * 2 * lam for x in min_max(table.column(f"outlier_ratio:{m:g}"))]
    return dict(zip(table.shapes, shift_to(raw, [row.n for row in table], target), strict=True))
