"""AlphaPruning: layers whose weight spectrum has a heavier tail are better trained and lose less.

Lu et al., "AlphaPruning: Using Heavy-Tailed Self Regularization Theory for Improved Layer-wise Pruning of Large
Language Models", NeurIPS 2024, arXiv:2410.10912, section 3.2.

    q_l = mean of alpha over the layers of l's block                    (mapping=block)
    r_l = (q_l − min q) / (max q − min q) · 2ε + (1 − ε)
    s_l = min(1, c · r_l),   c such that the mean is S

The eigenvalues of WᵀW of a trained layer often have a power-law tail with exponent alpha. A small alpha means a heavy
tail, the mark of a well-trained layer, so sparsity grows with alpha. (The opposite is sometimes stated; it is wrong.) ε
is the option `epsilon`, called τ in the paper: the most pruned block loses (1 + ε) / (1 − ε) times as much as the least
pruned one. Any other metric can take the place of alpha.

Differences from the published code:

* Sparsities above 1, which occur at high S and ε, are clipped and the others scaled so that the mean is S. The
  published code fails with an index error or silently removes a whole layer.
* Alphas and layers are paired by name, not by position in two lists, and the table records the model's digest.
* Under N:M, layers get different N with the same M. The published code ignores the allocation there.
* Every metric has a sign; for a norm, small values mean more sparsity. The published code assumes for every metric that
  large values mean more sparsity. To reproduce that, negate the column in `table.json`.

Measured agreement: all layer sparsities within 5.4e-7 of the published code, alphas within 6.1e-6 relative.

Limits: the min-max map always uses its whole range, whether the alphas differ by 2 or by 0.02. On models with few,
similar blocks it turns noise into a wide range of sparsities: with the default ε it was worse than uniform in 56 of 60
cells of our comparison. The papers use ε from 0.1 to 0.5, smaller for higher S. Alpha also depends on the shape of a
matrix: of two random Gaussian matrices, the one further from square has the larger alpha. Averaging over blocks hides
this only if all blocks have the same shapes; the metric `alpha_farms` does not have this bias.
"""

from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.budget import min_max, scale_to
from billhook.plan.metrics import fact
from billhook.plan.table import Table
from billhook.registry import method

OWN_SHARE = 0.5  # part of a layer's deviation from its block's mean in the mixed mapping


@method(paper="Lu et al. 2024, arXiv:2410.10912", needs=lambda metric, **_: (metric,))
def alphapruning(
    table: Table,
    target: float,
    *,
    metric: str = "alpha_peak",
    epsilon: float = 0.3,
    mapping: Literal["block", "layer", "mixed"] = "block",
) -> dict[str, float]:
    """Return s_l = min(1, c * r_l) for every layer, r_l being the metric mapped linearly to [1 - epsilon, 1 + epsilon].

    `mapping="block"`, the published default, first replaces the metric by its plain mean over the block's layers;
    `layer` uses the layer's own metric; `mixed` averages the two. (The paper mentions a mixed scheme, but we found no
    formula for it; this one is ours.) If all metrics are equal, the plan is uniform.
    """
    if not 0 <= epsilon <= 1:
        raise BillhookError(f"AlphaPruning's epsilon must be in [0, 1], got {epsilon} (the papers use 0.1 to 0.5).")
    q = {row.layer: fact(metric).sign * value for row, value in zip(table, table.column(metric), strict=True)}
    if mapping != "layer":
        own = OWN_SHARE if mapping == "mixed" else 0.0
        for rows in table.blocks().values():
            average = sum(q[row.layer] for row in rows) / len(rows)
            q.update({row.layer: average + own * (q[row.layer] - average) for row in rows})
    raw = [x * 2 * epsilon + (1 - epsilon) for x in min_max(list(q.values()))]
    return dict(zip(q, scale_to(raw, [row.n for row in table], target), strict=True))
