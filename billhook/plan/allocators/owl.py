"""OWL: blocks with more outliers among their Wanda scores lose less.

Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175. The outlier ratio of a block is
measured on the dense model (`outlier_ratio:M`, share of scores above M times the block's mean); retention lies in a
window of total width 2 lam around the target.
"""

from billhook.errors import BillhookError
from billhook.plan.budget import min_max, shift_to
from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Yin et al. 2024, arXiv:2310.05175", needs=lambda m, **_: (f"outlier_ratio:{m:g}",))
def owl(table: Table, target: float, *, lam: float = 0.08, m: float = 5.0) -> dict[str, float]:
    """s_i = S - (r_i - mean r),  r_i = (D_i - min D) / (max D - min D) * 2 lam, over blocks i.

    The published code averages over blocks without weights and replaces sparsities <= 0 by 0.01; here they are clipped
    to [0, 1] and a constant restores the parameter-weighted mean. Equal outlier ratios give the uniform plan.
    """
    if not 0 <= lam <= 0.5:
        raise BillhookError(f"OWL's lam must be in [0, 0.5], got {lam} (the paper uses 0.02 to 0.2).")
    raw = [-x * 2 * lam for x in min_max(table.column(f"outlier_ratio:{m:g}"))]
    return dict(zip(table.shapes, shift_to(raw, [row.n for row in table], target), strict=True))
