"""LAMP: one threshold over magnitudes that are comparable between layers.

Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning" (LAMP), ICLR 2021, arXiv:2010.07611. A weight's
score is its square over the sum of the squares that are left when all smaller ones of its layer are gone, so the
largest of each layer has score 1 and no layer is removed whole. It does not know the data.
"""

from billhook.plan.allocators.thresholds import cut
from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Lee et al. 2021, arXiv:2010.07611", needs=("lamp_quantiles",))
def lamp(table: Table, target: float) -> dict[str, float]:
    """s_l = share of layer l's LAMP scores below t,  t such that the mean is S."""
    return dict(
        zip(table.shapes, cut(table.curve("lamp_quantiles"), [row.n for row in table], target, 1.0), strict=True)
    )
