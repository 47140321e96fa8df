"""Global: the scores of all layers compete, and one threshold decides.

The classical form of magnitude pruning (Han et al. 2015, arXiv:1506.02626; Morcos et al. 2019). Scores must be
comparable between layers, which they are not by nature: a layer of small weights is removed whole, so a floor protects
every layer.
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
    """s_l = min(1 - floor, share of layer l's scores below t),  t such that the mean is S.

    At least a share `floor` of every layer is kept, or 1 - S if that is less.
    """
    if not 0 <= floor < 1:
        raise BillhookError(
            f"The floor, the share of every layer that is kept at least, must be in [0, 1), got {floor:g}."
        )
    curves = table.curve(f"{score}_quantiles")
    return dict(zip(table.shapes, cut(curves, [row.n for row in table], target, max(1 - floor, target)), strict=True))
