"""LAMP: one threshold for all layers, on magnitudes normalized within each layer.

Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv:2010.07611.

    score_u = w_u² / Σ w_v²   over the weights v of the layer that are not smaller than u
    s_l     = fraction of the layer's scores below t,   t such that the mean is S

The largest weight of each layer has score 1, so no layer is removed whole. The fractions are read from the column
`lamp_quantiles`: 129 quantiles of the square roots of the scores (which have the same order), interpolated linearly.
They are within 1/256 of those of sorting all weights together.

Limits: it was made for vision models and does not look at activations. On our language models it was mostly worse than
uniform.
"""

from billhook.plan.allocators.thresholds import cut
from billhook.plan.table import Table
from billhook.registry import method


@method(paper="Lee et al. 2021, arXiv:2010.07611", needs=("lamp_quantiles",))
def lamp(table: Table, target: float) -> dict[str, float]:
    """Return the fraction of each layer's LAMP scores that lies below the common threshold."""
    shares = cut(table.curve("lamp_quantiles"), [row.n for row in table], target, 1.0)
    return dict(zip(table.shapes, shares, strict=True))
