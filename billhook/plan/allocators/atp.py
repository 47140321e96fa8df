"""ATP: sparsity grows with depth as an arithmetic progression, so that later blocks amplify less error.

Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective", ICML 2025,
arXiv:2502.14770.

    s_i = S − β (L − 1) / 2 + β (i − 1),   i = 1 … L,   0 ≤ β ≤ 2 min(S, 1 − S) / (L − 1)

An error of an early block passes through all later blocks, so early blocks lose less. All layers of a block get the
block's sparsity. Only the layer shapes are needed.

Differences from the published code:

* β (the option `beta`) is given, or a quarter of its largest legal value is used, or `--set beta=auto` chooses it on
  held-out calibration windows. The published code chooses it on a grid in steps of 0.002 by the perplexity of the test
  text that is then reported.
* A β out of range is refused before the model is loaded, with the legal range.
* If blocks differ in size, a constant is added so that the mean is S.

Measured agreement: Wanda masks under ATP at three β equal the published ones in every weight.

Limits: it knows nothing about the model. At the largest β the last block is removed completely (S ≥ 0.5) or the first
one is left dense, and the last block of many models is sensitive.
"""

from billhook.errors import BillhookError
from billhook.plan.budget import shift_to
from billhook.plan.table import Table
from billhook.registry import method

BETA_STEP = 0.002


def largest_beta(blocks: int, target: float) -> float:
    """The largest common difference that keeps every block's sparsity in [0, 1]: 2 min(S, 1 - S) / (L - 1)."""
    return 2 * min(target, 1 - target) / (blocks - 1) if blocks > 1 else 0.0


def beta_grid(blocks: int, target: float) -> list[float]:
    """Return the paper's candidates: 0.002, 0.004, ... up to `largest_beta`."""
    return [round(i * BETA_STEP, 3) for i in range(1, int(largest_beta(blocks, target) / BETA_STEP + 1e-9) + 1)]


@method(paper="Huang et al. 2025, arXiv:2502.14770")
def atp(table: Table, target: float, *, beta: float | None = None) -> dict[str, float]:
    """Return s_i = S - beta (L - 1) / 2 + beta (i - 1) for all layers of block i of L.

    `beta` must be in [0, 2 min(S, 1 - S) / (L - 1)]; 0 is uniform, and without it a quarter of the largest value is
    used.
    """
    blocks = table.blocks()
    largest = largest_beta(len(blocks), target)
    step = largest / 4 if beta is None else beta
    if beta is not None and not 0 <= step <= largest * (1 + 1e-12):
        limits = f"[0, {largest:.6g}] for {len(blocks)} blocks at sparsity {target:g}"
        raise BillhookError(f"ATP's beta must be in {limits}, got {beta:g}.")
    first = target - step * (len(blocks) - 1) / 2
    depth = {row.layer: position for position, rows in enumerate(blocks.values()) for row in rows}
    raw = [first + step * depth[row.layer] for row in table]
    return dict(zip(table.shapes, shift_to(raw, [row.n for row in table], target), strict=True))
