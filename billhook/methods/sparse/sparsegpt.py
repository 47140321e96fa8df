"""SparseGPT: remove weights column by column and update the columns to the right to compensate.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
arXiv:2301.00774, algorithm 1. The weights of one block of columns are compared with each other.

    H = XᵀX + damping · mean(diag) · I,   U upper triangular with UᵀU = H⁻¹
    for each block of columns, from the left:
        score_ij = w_ij² / U_jj²                       with the weights as updated so far
        for each column j of the block:
            e = removed · w_j / U_jj
            columns to the right of j −= e ⊗ U_j,right

Under N:M the mask is chosen per group of M columns. The published H is (2 / sequences) · XᵀX; damping is relative to H,
so the factor cancels. Kept weights are updated. All arithmetic is in the dtype of W, float32 in a run.

Differences from the published code, none of which changes a result where the published code works:

* U comes from one factorization of H in reversed order and one triangular inverse, instead of factorizing, inverting
  and factorizing again: less than a third of the time, and more accurate in float32.
* Updates within a block are accumulated and applied to a column when its turn comes.
* Inputs that are always zero: their weights are removed first, but no more than planned. The published code removes all
  of them and misses the budget. Such inputs do not count in the mean of the diagonal.
* If the factorization fails, it is repeated with ten times the damping, up to three times, which is noted; then it is
  an error. Other tools continue with H = I, which is magnitude pruning without notice.
* The count is exact; the published code removes at least one weight too many in each block.
* For N:M whose M does not divide 128, the block is rounded to a multiple of M; there, masks at its edges are wrong.
* An expert without calibration tokens is pruned by magnitude, which is noted. There, all its weights are removed.

Measured agreement: perplexity of 16 runs within −0.04 % to +0.05 % of the published code's.

Limits: it compensates only to the right and only within the layer. A kept weight that becomes exactly zero counts as
kept.
"""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.least_squares import inverse_factor, shift_to_dense
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method

PANEL = 32  # columns that are brought up to date together, by one matrix product, inside a block


@method(
    paper="Frantar & Alistarh 2023, arXiv:2301.00774",
    needs=lambda dense_target, **_: ("gram", "drift") if dense_target else ("gram",),
    group="layer",
)
def sparsegpt(
    W: Tensor,
    stats: LayerStats,
    select: Select,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    dense_target: float = 0.0,
) -> Tensor:
    """Return W [out, in] pruned and updated; reads stats.gram [in, in] and, for dense_target, stats.drift.

    Masks are chosen for `block_size` columns at a time (for N:M rounded down to a multiple of M, at least M). `damping`
    is a fraction of the mean of H's diagonal. `dense_target` is that of `admm`; it is not in the paper. Raises JobError
    if H cannot be factorized, BillhookError for options out of range.
    """
    if block_size < 1 or not 0 <= damping < float("inf") or not 0 <= dense_target <= 1:
        raise BillhookError(
            f"sparsegpt: block_size={block_size} must be at least 1, damping={damping} finite and not negative, "
            f"dense_target={dense_target} in [0, 1]."
        )
    assert stats.gram is not None
    W = shift_to_dense(W, stats, dense_target, damping)
    gram = stats.gram.to(W.dtype)
    dead = gram.diagonal() <= 0
    stats.note_zero_inputs(dead)
    U = inverse_factor(gram, dead, damping, stats)
    group = 1 if select.keep_of is None else select.keep_of[1]
    width = max(block_size // group, 1) * group
    columns = W.t().clone(memory_format=torch.contiguous_format)  # contiguous() of a single row would return W itself
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        errors = _prune_block(columns[start:stop], U[start:stop, start:stop], dead[start:stop], select, start)
        columns[stop:].addmm_(U[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t().contiguous()


def _prune_block(block: Tensor, U: Tensor, dead: Tensor, select: Select, start: int) -> Tensor:
    """Prune `block` [c, out] (transposed weights from column `start` on) in place; return the scaled errors [c, out].

    The result equals that of updating all later columns after every column: a mask is chosen only when the columns it
    covers are up to date.
    """
    width = len(block)
    chosen, panel = (width, PANEL) if select.keep_of is None else (select.keep_of[1],) * 2
    errors, removed = torch.zeros_like(block), torch.empty_like(block, dtype=torch.bool)
    scale = U.diagonal()[:, None]
    for at in range(0, width, panel):
        to = min(at + panel, width)
        block[at:to].addmm_(U[:at, at:to].t(), errors[:at], alpha=-1)
        if at % chosen == 0:
            here = slice(at, at + chosen)
            squares = block[here].square()
            # dead inputs before all others, the smallest weights among them first
            score = torch.where(dead[here, None], -1 / (1 + squares), squares / scale[here].square())
            removed[here] = ~select(score.t(), start + at).t()
            torch.div(removed[here], scale[here], out=errors[here])
        for j in range(at, to):
            if j > at:
                block[j].addmv_(errors[at:j].t(), U[at:j, j], alpha=-1)
            errors[j].mul_(block[j])
    block.masked_fill_(removed, 0)
    return errors
