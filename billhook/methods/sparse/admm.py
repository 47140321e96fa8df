"""ADMM: choose the mask step by step while the weights are updated, then solve exactly for the kept weights.

Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv:2401.02938; the final solve
as in Meng et al., "ALPS", NeurIPS 2024, arXiv:2406.07831. The weights of one output row are compared with each other.

    H = XᵀX + damping · mean(diag) · I, then columns of W times √H_jj, so that diag(H) = 1
    repeat:  Z = V + U where |V + U| is among the largest, else 0;   U = U + V − Z
             V = W + rho · (Z − U − W)(H + rho · I)⁻¹
    finally: V = argmin Σ (w − v) H (w − v)ᵀ with zeros where the last Z has them

The sparsity of Z rises to the plan's over nine steps, s (1 − (1 − k/9)³) at step k; an N:M pattern applies from the
start. From then on rho rises at every third step, as in ALPS: by 30, 20 or 10 % if more than 10 %, more than 0.5 % or
less of the mask has changed; if nothing has, the alternation ends. U is divided by the same factor.

The number of steps falls with the width: 48 up to 192 inputs, 18 at 512, 3 at 1024, 2 from 1536 on. Beyond 512 inputs
rho stays at 0.6. This takes three times as long as SparseGPT at 1024 × 1024 and 4.6 times at 4096 × 4096. Of the gain
over SparseGPT in the layer's loss, most is there after three steps.

`dense_target` (0.5) moves the target of the least squares towards the dense model, see
`billhook.methods.least_squares`; the layers of a block are then pruned one group after the other, and layers that
write into the residual stream weigh large tokens down (`billhook.engine.dense_stream`).

Differences from the published code:

* rho rises with a new inverse each time, which costs less than the eigendecomposition of ALPS: one product a step.
* The final values are the optimum: batched Cholesky factorizations in float64 for up to 256 kept weights in a row, else
  conjugate gradients from the iterate. The result is never worse than its own mask without the update, row by row.
* The budget is exact, for any comparison group and any N:M.
* Damping is SparseGPT's, ten times as much where the factorization fails, which is noted; there it is 0.1 of H's
  diagonal. Inputs that are always zero lose their weights first. Arithmetic is float64 up to 512 inputs.

Measured: excess log-perplexity 0.3 to 0.7 of the best published run's at 60 %, uniform.

Limits: with fewer tokens than inputs, the damping decides what the text leaves open, which is noted. Narrow layers take
far longer than with SparseGPT.
"""

from dataclasses import replace

import torch
from torch import Tensor

from billhook.errors import BillhookError, JobError
from billhook.methods.least_squares import ATTEMPTS, DOUBLE, shift_to_dense, solve_support
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.registry import method

RAMP = 9  # steps until the sparsity is the plan's
_WORK = 9216, 3072  # steps times inputs, up to `DOUBLE` inputs and beyond
_RHO = 0.3, 0.6
# (fraction, factor): rho rises by the first factor for which more than this fraction of the mask has changed
_RISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


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
    """Return W [out, in] pruned and updated; reads stats.gram and stats.drift, both [in, in].

    `steps` is the largest number of alternations and `rho` the initial weight of the constraint relative to H's
    diagonal (none: chosen by width). `damping` is a fraction of the mean of H's diagonal. `dense_target` is the weight,
    in [0, 1], of the dense model's own outputs in the target (0: the dense layer's outputs for the pruned model's
    inputs). Raises BillhookError for options out of range, JobError if H cannot be factorized.
    """
    inputs = W.shape[1]
    steps = default_steps(inputs) if steps is None else steps
    rho = _RHO[inputs > DOUBLE] if rho is None else rho
    _check_options(steps, rho, damping, dense_target)
    assert stats.gram is not None
    W = shift_to_dense(W, stats, dense_target, damping)
    dtype = torch.float64 if inputs <= DOUBLE else W.dtype
    used = damping
    for _ in range(ATTEMPTS):
        H, scale = _unit_diagonal(stats, used, dtype)
        X = W.to(dtype) * scale
        keep, start = _alternate(X, H, select, steps, rho)
        solution = solve_support(X, H, keep, start, max(steps, 3))
        if solution is not None:
            break
        used = max(10 * used, 1e-4)
    else:
        raise JobError("ADMM: the input statistics cannot be factorized; use more calibration text or damping.")
    if used != damping:
        stats.note(f"damping raised from {damping:g} to {used:g}: the factorization failed below it")
    return torch.where(keep, solution.weight / scale, 0).to(W.dtype)


def _check_options(steps: int, rho: float, damping: float, dense_target: float) -> None:
    if steps < 1 or not 0 < rho < float("inf") or not 0 <= damping < float("inf") or not 0 <= dense_target <= 1:
        raise BillhookError(
            f"admm: steps={steps} must be at least 1, rho={rho} above 0, damping={damping} finite and not negative, "
            f"dense_target={dense_target} in [0, 1]."
        )


def default_steps(inputs: int) -> int:
    """Return the largest number of alternations for a layer with this many inputs."""
    return min(max(_WORK[inputs > DOUBLE] // inputs, 2), 48)


def _unit_diagonal(stats: LayerStats, damping: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return H [in, in] with a unit diagonal and the scale [in] of the weights; inputs that are zero come first."""
    assert stats.gram is not None
    gram = stats.gram.to(dtype)
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    mean = diagonal.sum() / max(int((~dead).sum()), 1)
    stats.note_zero_inputs(dead)
    if 0 < stats.tokens < len(dead):
        few = f"{stats.tokens} calibration tokens for {len(dead)} inputs"
        stats.note(f"{few}: the damping decides what they leave open")
    scale = torch.where(dead, 1e-12 * mean.clamp_min(1e-12), diagonal + damping * mean).sqrt()
    H = gram / scale / scale[:, None]
    H.diagonal().fill_(1.0)
    return H, scale


def _alternate(X: Tensor, H: Tensor, select: Select, steps: int, rho: float) -> tuple[Tensor, Tensor]:
    """Return the mask, bool [out, in], and the values at the end of the alternation, both for H's unit diagonal."""
    ramp = 0 if select.keep_of is not None else min(steps, RAMP)
    inverse, before = _inverse(H, rho), None
    U, V = torch.zeros_like(X), X
    for step in range(1, steps + 1):
        total = V + U
        part = 1 - (1 - step / ramp) ** 3 if step < ramp else 1.0
        keep = replace(select, sparsity=select.sparsity * part, zeros=round(select.zeros * part))(total.abs())
        Z = total * keep
        U = total - Z
        if ramp <= step < steps and step % 3 == 0:
            changed = 1.0 if before is None else float((keep ^ before).sum()) / 2 / max(int(keep.sum()), 1)
            if changed == 0:
                return keep, total
            rise, before = next(rise for least, rise in _RISES if changed > least), keep
            rho, U, inverse = rho * rise, U / rise, _inverse(H, rho * rise)
        V = torch.addmm(X, Z - U - X, inverse, alpha=rho)
    total = V + U
    return select(total.abs()), total


def _inverse(H: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1."""
    damped = H.clone()
    damped.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))
