"""ADMM: choose the support gradually, by alternating directions on the layer's least squares, then solve exactly on it.

Boza 2024, "Fast and Effective Weight Update for Pruned Large Language Models", arXiv:2401.02938, with the final solve
of ALPS (Meng et al. 2024, arXiv:2406.07831): minimize sum over rows of (w - v) H (w - v)^T over V with the planned
zeros, H = X^T X + damping
* mean(diag) * I. In coordinates where H has a unit diagonal (columns of W times sqrt(H_jj)) the two steps of
  alternation k are

    Z = (V + U) where |V + U| is among the largest, else 0;    U = U + V - Z
    V = argmin (w - v) H (w - v)^T + rho |v - (Z - U)|^2 = w + rho (Z - U - w) (H + rho I)^-1

with the sparsity of Z rising to the plan's by the cubic schedule s (1 - (1 - k / n)^3) over the first n = `RAMP` steps;
for N:M it is the plan's from the start. After that rho rises at every third step, as in ALPS: by 30 %, 20 % or 10 %
where more than 10 %, more than 0.5 % or less of the support has changed meanwhile; where none of it has, the
alternation ends. U is divided by as much as rho rises. The support of the last Z is kept, and the weights on it are
solved for by `billhook.methods.least_squares`: exactly where few are kept in a row, else by conjugate gradients from
Z.

Differences from the published code: V needs one product a step, not two; the exact solve at the end; the support comes
from `select`, so the budget is exact and groups may be rows (the default) or layers. ALPS has the plan's sparsity from
the start and an eigendecomposition of H in place of an inverse for each rho, which takes two products a step. `steps`,
at most, falls with the width by default: 48 up to 192 inputs, 18 at 512, 3 at 1024, 2 from 1536 on, where rho never
rises and begins at 0.6 instead of 0.3: for about three times the time of SparseGPT at 1024 to 2816 inputs and more at
4096; narrow layers take much longer than that. On two blocks of a small model most of the gain was there after three
steps.

What the layer aims at is, by `dense_target` (half of the way), between the dense layer's outputs for the pruned model's
inputs and the outputs in the dense model: `billhook.methods.least_squares.aimed`; the layers of a block are then pruned
one after the other (`billhook.engine.dense_stream`).

An input that is always zero ("dead") loses its weights first, the smallest first, as many as are asked for; what is
kept there has its original value. Up to 512 inputs all arithmetic is float64, else in the dtype of W (float32 in a
run); the system of a step is well conditioned (at most 1 + in / rho).
"""

from dataclasses import replace

import torch
from torch import Tensor

from billhook.errors import BillhookError, JobError
from billhook.methods.least_squares import DOUBLE, aimed, solve_support
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method

LADDER = 4  # attempts, each with ten times the damping of the one before
RAMP = 9  # steps until the sparsity is the plan's
_WORK = 9216, 3072  # steps times inputs, up to `DOUBLE` inputs and beyond
_RHO = 0.3, 0.6
_RISES = (
    (0.1, 1.3),
    (0.005, 1.2),
    (0.0, 1.1),
)  # where more of the support than the first has changed, rho rises by the second


@method(
    paper="Boza 2024, arXiv:2401.02938",
    needs=lambda dense_target, **_: ("gram", "drift") if dense_target else ("gram",),
    group="row",
)
def admm(
    W: Tensor,
    stats: LayerStats,
    select: Select,
    *,
    steps: int | None = None,
    rho: float | None = None,
    damping: float = 0.01,
    dense_target: float = 0.5,
) -> Tensor:
    """Return W [out, in] pruned and updated; reads stats.gram and stats.drift [in, in].

    `steps` is the number of alternations at most, `rho` the weight of the constraint, relative to H's diagonal, at the
    beginning (none: by the width), `damping` a fraction of the mean of H's diagonal, `dense_target` the share of the
    dense model's own outputs in what is aimed at (0: the dense layer's outputs for the pruned model's inputs). Raises
    BillhookError for options out of range, JobError when H cannot be factorized.
    """
    inputs = W.shape[1]
    steps = default_steps(inputs) if steps is None else steps
    rho = _RHO[inputs > DOUBLE] if rho is None else rho
    if steps < 1 or not 0 < rho < float("inf") or not 0 <= damping < float("inf") or not 0 <= dense_target <= 1:
        values = (
            f"steps={steps} must be at least 1, rho={rho} above 0, damping={damping} finite and not negative, "
            f"dense_target={dense_target} in [0, 1]"
        )
        raise BillhookError(f"admm: {values}.")
    assert stats.gram is not None
    W = aimed(W, stats, dense_target, damping)
    dtype = torch.float64 if inputs <= DOUBLE else W.dtype
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
        raise JobError(
            "ADMM: the input statistics cannot be factorized; use more calibration text, more damping or another "
            "criterion."
        )
    if used != damping:
        stats.note(f"damping raised from {damping:g} to {used:g}: the factorization failed below it")
    return torch.where(keep, solution.weight / scale, 0).to(W.dtype)


def default_steps(inputs: int) -> int:
    """The alternations of a layer with so many inputs, at most."""
    return min(max(_WORK[inputs > DOUBLE] // inputs, 2), 48)


def _unit_diagonal(stats: LayerStats, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """H [in, in] with a unit diagonal, and the scale [in] of the weights that goes with it; dead inputs go first."""
    assert stats.gram is not None
    gram = stats.gram.to(dtype)
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = diagonal.sum() / max(int((~dead).sum()), 1)
    if dead.any():
        stats.note(
            f"{int(dead.sum())} of {len(dead)} inputs are zero on all calibration text; their weights are removed first"
        )
    if 0 < stats.tokens < len(dead):
        stats.note(
            f"{stats.tokens} calibration tokens for {len(dead)} inputs: the damping decides what they leave open"
        )
    scale = torch.where(dead, 1e-12 * mean.clamp_min(1e-12), diagonal + damping * mean).sqrt()
    H = gram / scale / scale[:, None]
    H.diagonal().fill_(1.0)
    return H, scale


def _alternate(X: Tensor, H: Tensor, select: Select, steps: int, rho: float) -> tuple[Tensor, Tensor]:
    """The support, bool [out, in], and the values that the alternation ends with; X and H in coordinates of unit
    diagonal."""
    ramp = 0 if select.keep_of is not None else min(steps, RAMP)
    inverse, before = _inverse(H, rho), None
    U, V = torch.zeros_like(X), X
    for step in range(1, steps + 1):
        all_reduce_ = V + U
        share = 1 - (1 - step / ramp) ** 3 if step < ramp else 1.0
        keep = replace(select, sparsity=select.sparsity * share, zeros=round(select.zeros * share))(all_reduce_.abs())
        Z = all_reduce_ * keep
        U = all_reduce_ - Z
        if ramp <= step < steps and step % 3 == 0:
            changed = 1.0 if before is None else float((keep ^ before).sum()) / 2 / max(int(keep.sum()), 1)
            if changed == 0:
                return keep, all_reduce_
            rise, before = next(rise for least, rise in _RISES if changed > least), keep
            rho, U, inverse = rho * rise, U / rise, _inverse(H, rho * rise)
        V = torch.addmm(X, Z - U - X, inverse, alpha=rho)
    all_reduce_ = V + U
    return select(all_reduce_.abs()), all_reduce_


def _inverse(H: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1."""
    damped = H.clone()
    damped.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
