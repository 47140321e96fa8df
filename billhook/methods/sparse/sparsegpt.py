"""SparseGPT: remove weights column by column and let the remaining ones make up for the loss.

Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv:2301.00774,
algorithm 1. With H = X^T X + damping * mean(diag) * I and U the upper Cholesky factor of H^-1, blocks of columns are
taken from left to right: the mask of a block comes from w_ij^2 / U_jj^2 with the weights as they stand when the block
begins (N:M: when each group of M begins), and each removed weight's error w_ij / U_jj is subtracted, times U_j,rest,
from the columns to its right.

The published H is (2 / sequences) X^T X; the damping is relative to H, so a common factor multiplies U and cancels
everywhere.

Differences from the published code, none of which changes a result where the published code works:

* U is the inverse of the Cholesky factor of H with rows and columns reversed: one factorization and one triangular
  inverse instead of factor, invert, factor again; less than a third of the time, and more accurate in float32.
* The weights are held transposed, and a column collects the errors of its block's earlier columns when its turn comes,
  not before.
* An input that is always zero ("dead") has its weights removed first, but only as many as are asked for: the published
  code zeroes all of them, which misses the planned sparsity. What is kept there has its original value. Dead inputs do
  not enter the mean in the damping.
* A factorization that fails is tried again with ten times the damping, which is noted in the report, and finally is an
  error.

All arithmetic is in the dtype of W (float32 in a run). A kept weight that the update makes exactly zero is possible in
principle and is counted as kept. It does not know about layers other than its own.
"""

import torch
from torch import Tensor

from billhook.errors import BillhookError, JobError
from billhook.methods.least_squares import aimed
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method

PANEL = 32  # columns that are brought up to date together, by one matrix product, inside a block
LADDER = 4  # attempts, each with ten times the damping of the one before


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

    Masks are chosen for `block_size` columns at a time (for N:M the block is rounded down to a multiple of M, at least
    M); `damping` is a fraction of the mean of H's diagonal; `dense_target` is that of `billhook.methods.sparse.admm`,
    not in the paper. Raises JobError when H cannot be factorized, BillhookError for options out of range.
    """
    if block_size < 1 or not 0 <= damping < float("inf") or not 0 <= dense_target <= 1:
        values = (
            f"block_size={block_size} must be at least 1, damping={damping} finite and not negative, "
            f"dense_target={dense_target} in [0, 1]"
        )
        raise BillhookError(f"sparsegpt: {values}.")
    assert stats.gram is not None
    W = aimed(W, stats, dense_target, damping)
    gram = stats.gram.to(W.dtype)
    dead = gram.diagonal() <= 0
    if dead.any():
        stats.note(
            f"{int(dead.sum())} of {len(dead)} inputs are zero on all calibration text; their weights are removed first"
        )
    U = inverse_factor(gram, dead, damping, stats)
    group = 1 if select.keep_of is None else select.keep_of[1]
    width = max(block_size // group, 1) * group
    columns = W.t().clone(memory_format=torch.contiguous_format)  # of one row, contiguous() would be W itself
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        errors = _prune_block(columns[start:stop], U[start:stop, start:stop], dead[start:stop], select, start)
        columns[stop:].addmm_(U[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t().contiguous()


def inverse_factor(gram: Tensor, dead: Tensor, damping: float, stats: LayerStats) -> Tensor:
    """Return U [in, in], upper triangular with U^T U = (gram + damping * mean(diag))^-1; dead inputs stand alone with 1
    on the diagonal.

    Raises the damping tenfold, with a note, while the factorization fails; raises JobError when it still does.
    """
    H = gram.flip(0, 1)
    diagonal = H.diagonal()
    dead = dead.flip(0)
    mean = diagonal.sum() / max(int((~dead).sum()), 1)
    original = torch.where(dead, 1.0, diagonal)
    used = damping
    for _ in range(LADDER):
        diagonal.copy_(original + used * mean)
        L, failed = torch.linalg.cholesky_ex(H)
        if not failed:
            break
        used = max(10 * used, 1e-4)
    else:
        raise JobError(
            f"SparseGPT: the input statistics cannot be factorized, even with damping {used / 10:g}; "
            "use more calibration text, --dtype float32 or another criterion."
        )
    if used != damping:
        stats.note(f"damping raised from {damping:g} to {used:g}: the factorization failed below it")
    del H, diagonal  # at 14336 inputs each of these matrices is 0.8 GB
    # H = R R^T with R = flip(L) upper triangular, hence H^-1 = U^T U with U = R^-1 = flip(L^-1)
    return invert_lower_(L).flip(0, 1)


def invert_lower_(L: Tensor, leaf: int = 256) -> Tensor:
    """Invert a lower triangular matrix in place, by halves: a third of the arithmetic of solving against the
    identity."""
    solve = torch.linalg.solve_triangular
    if len(L) <= leaf:
        return L.copy_(solve(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False))
    half = len(L) // 2
    A, B, C = L[:half, :half], L[half:, :half], L[half:, half:]
    B.copy_(-solve(C, solve(A, B, upper=False, left=False), upper=False))
    invert_lower_(A, leaf)
    invert_lower_(C, leaf)
    return L


def _prune_block(block: Tensor, U: Tensor, dead: Tensor, select: Select, start: int) -> Tensor:
    """Prune `block` [c, out] (transposed weights from column `start` on) in place; return the scaled errors [c, out].

    Equals updating all later columns after every column: a mask is chosen only where the columns it covers are up to
    date.
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
