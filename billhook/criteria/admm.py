"""ADMM: choose the support gradually, by alternating directions on the layer's least squares, then solve exactly on it.

Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938, with the final solve of ALPS
(Meng et al. 2024, arXiv:2406.07831): minimize sum over rows of (w - v) H (w - v)^T over V with the planned zeros, H = X^T X + damping
* mean(diag) * I. In coordinates where H has a unit diagonal (columns of W times sqrt(H_jj)) the two steps of alternation k are

    Z = (V + U) where |V + U| is among the largest, else 0;    U = U + V - Z
    V = argmin (w - v) H (w - v)^T + rho |v - (Z - U)|^2 = w + rho (Z - U - w) (H + rho I)^-1

with the sparsity of Z rising to the plan's by the cubic schedule s (1 - (1 - k / steps)^3); for N:M it is the plan's from the start. The
support of the last Z is kept, and the weights on it are solved for by `billhook.least_squares`: exactly where few are kept in a row,
else by conjugate gradients from Z.

Differences from the published code: V needs one product a step, not two; the exact solve at the end; the support comes from `select`,
so the budget is exact and groups may be rows (the default) or layers.
`steps` by default falls with the width: 32 up to 192 inputs, 12 at 512, 3 at 1024, 2 from 1536 on, for about three times the time of
SparseGPT at 1024 to 2816 inputs and more at 4096; narrow layers take much longer than that. On two blocks of a small model most of the
gain was there after three steps.

What the layer aims at is, by `aim` (half of the way), between the dense layer's outputs for the pruned model's inputs and the outputs in
the dense model: `billhook.least_squares.aimed`; the layers of a block are then pruned one after the other (`billhook.beside`).

An input that is always zero ("dead") loses its weights first, the smallest first, as many as are asked for; what is kept there has its
original value. Up to 512 inputs all arithmetic is float64, else in the dtype of W (float32 in a run); the system of a step is well
conditioned (at most 1 + in / rho).
"""

from dataclasses import replace

import torch
from torch import Tensor

from billhook.errors import BillhookError, JobError
from billhook.least_squares import DOUBLE, aimed, solve_support
from billhook.masks import Select
from billhook.registry import method
from billhook.stats import LayerStats

LADDER = 4  # attempts, each with ten times the damping of the one before
_WORK = 6144, 3072  # steps times inputs, up to `DOUBLE` inputs and beyond


@method(paper="Boza 2024, arXiv:2401.02938", needs=lambda aim, **_: ("gram", "drift") if aim else ("gram",), group="row")
def admm(
    W: Tensor,
    stats: LayerStats,
    select: Select,
    *,
    steps: int | None = None,
    rho: float = 0.6,
    damping: float = 0.01,
    aim: float = 0.5,
) -> Tensor:
    """Return W [out, in] pruned and updated; reads stats.gram and stats.drift [in, in].

    `steps` is the number of alternations (none: by the width), `rho` the weight of the constraint relative to H's diagonal, `damping` a
    fraction of the mean of H's diagonal, `aim` the share of the dense model's own outputs in what is aimed at (0: the dense layer's
    outputs for the pruned model's inputs). Raises BillhookError for options out of range, JobError when H cannot be factorized.
    """
    if (steps is not None and steps < 1) or not 0 < rho < float("inf") or not 0 <= damping < float("inf") or not 0 <= aim <= 1:
        values = f"steps={steps} must be at least 1, rho={rho} above 0, damping={damping} finite and not negative, aim={aim} in [0, 1]"
        raise BillhookError(f"admm: {values}.")
    assert stats.gram is not None
    W = aimed(W, stats, aim, damping)
    inputs = W.shape[1]
    dtype = torch.float64 if inputs <= DOUBLE else W.dtype
    steps = default_steps(inputs) if steps is None else steps
    used = damping
    for _ in range(LADDER):
        H, scale = _unit_diagonal(stats, used, dtype)
        X = W.to(dtype) * scale
        keep, start = _alternate(X, H, select, steps, rho)
        solution = solve_support(X, H, keep, start, max(steps, 3))
        if solution is not None:
            break
        used = max(10 * used, 1e-4)
    else:
        raise JobError("ADMM: the input statistics cannot be factorized; use more calibration text, more damping or another criterion.")
    if used != damping:
        stats.note(f"damping raised from {damping:g} to {used:g}: the factorization failed below it")
    return torch.where(keep, solution.weight / scale, 0).to(W.dtype)


def default_steps(inputs: int) -> int:
    """The alternations of a layer with so many inputs."""
    return min(max(_WORK[inputs > DOUBLE] // inputs, 2), 32)


def _unit_diagonal(stats: LayerStats, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """H [in, in] with a unit diagonal, and the scale [in] of the weights that goes with it; dead inputs go first."""
    assert stats.gram is not None
    gram = stats.gram.to(dtype)
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = diagonal.sum() / max(int((~dead).sum()), 1)
    if dead.any():
        stats.note(f"{int(dead.sum())} of {len(dead)} inputs are zero on all calibration text; their weights are removed first")
    if 0 < stats.tokens < len(dead):
        stats.note(f"{stats.tokens} calibration tokens for {len(dead)} inputs: the damping decides what they leave open")
    scale = torch.where(dead, 1e-12 * mean.clamp_min(1e-12), diagonal + damping * mean).sqrt()
    H = gram / scale / scale[:, None]
    H.diagonal().fill_(1.0)
    return H, scale


def _alternate(X: Tensor, H: Tensor, select: Select, steps: int, rho: float) -> tuple[Tensor, Tensor]:
    """The support, bool [out, in], and the values that the alternation ends with; X and H in coordinates of unit diagonal."""
    damped = H.clone()
    damped.diagonal().add_(rho)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    U, V = torch.zeros_like(X), X
    for step in range(1, steps + 1):
        sum_ = V + U
        share = 1.0 if select.keep_of is not None else 1 - (1 - step / steps) ** 3
        part = replace(select, sparsity=select.sparsity * share, zeros=round(select.zeros * share))
        Z = sum_ * part(sum_.abs())
        U = sum_ - Z
        V = torch.addmm(X, Z - U - X, inverse, alpha=rho)
    sum_ = V + U
    return select(sum_.abs()), sum_
