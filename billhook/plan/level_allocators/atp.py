"""ATP for levels: bits fall with depth as an arithmetic progression, so that later blocks amplify less error.

Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical Perspective", ICML 2025,
arXiv:2502.14770, which reports mixed precision without constants. This is its progression of sparsities, as bits:

    b_i = B + β (L − 1) / 2 − β (i − 1),   i = 1 … L,   0 ≤ β ≤ 2 min(B − b_min, b_max − B) / (L − 1)

B are the budget's bits a weight, b_min and b_max those of the smallest and the largest types. The bits are rounded to
types so that the budget is spent (largest remainder). By default β is half of its largest value; a quarter, as for
sparsities, is often undone by the rounding.

Limits: it knows nothing about the model.
"""

from billhook.errors import BillhookError
from billhook.plan.level_allocators.rounding import mean_bits, nearest_types
from billhook.plan.levels import Levels, Types
from billhook.registry import method


@method(paper="Huang et al. 2025, arXiv:2502.14770")
def atp(levels: Levels, *, beta: float | None = None) -> Types:
    """Return types near B + beta (L - 1) / 2 - beta (i - 1) bits for all layers of block i of L.

    `beta` is in bits a block and in [0, 2 min(B - b_min, b_max - B) / (L - 1)]; 0 is even. Without it, half of the
    largest value is used.
    """
    blocks = levels.table.blocks()
    least, mean, most = mean_bits(levels)
    largest = 2 * max(min(mean - least, most - mean), 0.0) / max(len(blocks) - 1, 1)
    step = largest / 2 if beta is None else beta
    if not 0 <= step <= largest * (1 + 1e-9):
        limits = f"[0, {largest:.4g}] for {len(blocks)} blocks at {mean:.3g} bits"
        raise BillhookError(f"ATP's beta must be in {limits}, got {step:g}.")
    depth = {row.layer: position for position, rows in enumerate(blocks.values()) for row in rows}
    return nearest_types(levels, {name: -step * i for name, i in depth.items()}, "differences")
