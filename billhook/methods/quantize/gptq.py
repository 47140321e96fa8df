"""GPTQ: round column by column, and let the columns to the right make up for each error.

Frantar, Ashkboos, Hoefler & Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023, arXiv:2210.17323, algorithm 1, on any grid.

    G = (1 − s) XᵀX + s · diag(XᵀX),   s = shrinkage · in / (in + tokens)
    H = G + damping · mean(diag) · I,   U upper triangular with UᵀU = H⁻¹
    for each block of columns that shares its scales, from the left:
        scales = argmin Σ_j (w_j − value_j)² / U_jj²          with the weights as updated so far
        for each code S of the block (one column, or the vector of a code book):
            E = (w_S − value_S) U_SS⁻¹
            columns to the right of S −= E · U_S,right
    then `sweeps` times: every scale and code in turn becomes the best one for the layer's output, all others fixed

XᵀX of a text is XᵀX of other text with noise, and errors are passed on along the noise. The fewer tokens there are for
the inputs of a layer, the more the Gram matrix is shrunk towards its diagonal, which a short text already gives well:
with 8192 tokens for 8960 inputs, GPTQ as published loses more than rounding does on text that it has not seen.

`dense_target` moves the target of the least squares towards the dense model as in GPTAQ (arXiv:2504.02692), see
`billhook.methods.least_squares`; layers that write into the residual stream then weigh large tokens down
(`billhook.engine.dense_stream`). A sweep is one round of coordinate descent on (w − v) H (w − v)ᵀ, which never rises.

Differences from the published code:

* Scales are searched for the least weighted error, not taken from the largest weight, and rounded as they are stored
  before any code is chosen.
* U comes from one factorization; it is repeated with more damping if it fails, as in `sparsegpt`.
* Weights that are exactly zero, as after pruning, stay zero where the grid has a zero.
* `sweeps=0`, `dense_target=0` and `shrinkage=0` give the published algorithm on this grid.

Limits: it compensates within a layer only.
"""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.least_squares import inverse_factor, noise_share, shift_to_dense, shrunk
from billhook.methods.quantize.grid import Grid, Quantized, Scales
from billhook.methods.quantize.polish import polish
from billhook.methods.statistics import LayerStats
from billhook.registry import method
from billhook.runtime.codes import Values, round_columns
from billhook.runtime.plain_codes import inverse

ROWS = 2048  # of a weight at a time, so that what is computed for a column stays in the cache
PANEL = 64  # columns at least that are rounded between two products with the errors before them


@method(
    paper="Frantar et al. 2023, arXiv:2210.17323",
    needs=lambda dense_target, **_: ("gram", "drift") if dense_target else ("gram",),
)
def gptq(
    W: Tensor,
    stats: LayerStats,
    grid: Grid,
    *,
    damping: float = 0.01,
    dense_target: float = 0.5,
    sweeps: int = 4,
    shrinkage: float = 1.0,
) -> Quantized:
    """Return W [out, in] on the grid; reads stats.gram and, for dense_target, stats.drift, both [in, in].

    `damping` is a fraction of the mean of H's diagonal; `dense_target` in [0, 1] is that of `admm`. Raises JobError if
    H cannot be factorized, BillhookError for options out of range.
    """
    if not 0 <= damping < float("inf") or not 0 <= dense_target <= 1 or sweeps < 0 or not 0 <= shrinkage <= 1:
        raise BillhookError(
            f"gptq: damping={damping} must be finite and not negative, dense_target={dense_target} and "
            f"shrinkage={shrinkage} in [0, 1], sweeps={sweeps} at least 0."
        )
    assert stats.gram is not None
    gram, share = stats.gram.to(W.dtype), shrinkage * noise_share(W.shape[1], stats.tokens)
    dead = gram.diagonal() <= 0
    zero = [part == 0 if grid.has_zero else None for part in W.split(ROWS)]
    U = inverse_factor(gram, dead, damping, stats, share)
    target = shift_to_dense(W, stats, dense_target, damping, U).split(ROWS)
    made = [feedback(part, U, grid, fixed) for part, fixed in zip(target, zero, strict=True)]
    if sweeps:
        del U  # as large as H
        H = shrunk(gram, share)
        mean = H.diagonal().sum() / max(int((~dead).sum()), 1)
        H.diagonal().add_(torch.where(dead, 1, damping * mean))
        made = [polish(part, H, some, sweeps, fixed) for part, some, fixed in zip(target, made, zero, strict=True)]
    return Quantized.join(made)


def feedback(W: Tensor, U: Tensor, grid: Grid, zero: Tensor | None = None) -> Quantized:
    """GPTQ proper: W [out, in], U [in, in] of `inverse_factor`; codes are 0 where `zero` bool [out, in]."""
    weight = U.diagonal().square().reciprocal()
    columns = W.t().clone(memory_format=torch.contiguous_format)
    codes, fitted = torch.empty_like(columns), []
    for start in range(0, len(columns), grid.block):
        part = slice(start, start + grid.block)
        scales = grid.fit(columns[part].t().contiguous(), weight[part] / weight[part].mean())
        fixed = None if zero is None else zero[:, part].t()
        codes[part], errors = _round_block(columns[part], U[part, part], scales, grid, fixed)
        columns[part.stop :].addmm_(U[part, part.stop :].t(), errors, alpha=-1)
        fitted.append(scales)
    return Quantized(grid, codes.t().to(torch.int8), Scales.join(fitted))


def _round_block(block: Tensor, U: Tensor, scales: Scales, grid: Grid, fixed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The codes of `block` [columns, out], transposed weights that share their scales, and the errors to pass on.

    Codes are 0 where `fixed`, bool [columns, out].
    """
    scale = scales.scale.t().contiguous()
    offset = None if scales.offset is None else scales.offset.t().contiguous()
    codes, errors = torch.empty_like(block), torch.zeros_like(block)
    width = max(1, PANEL // grid.group)  # groups
    for first in range(0, len(scale), width):
        some = slice(first, first + width)
        panel = slice(first * grid.group, min(some.stop * grid.group, len(block)))
        x = block[panel].addmm_(U[: panel.start, panel].t(), errors[: panel.start], alpha=-1)
        if grid.step == 1:
            values = Values(scale[some], None if offset is None else offset[some], grid.points)
            zero = None if fixed is None else fixed[panel]
            codes[panel], errors[panel] = round_columns(x, U[panel, panel], values, zero)
        else:
            codes[panel], errors[panel] = _round_vectors(x, U[panel, panel], scale[some], grid)
    return codes, errors


def _round_vectors(x: Tensor, U: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The same for columns x [columns, out] whose codes are vectors; scale [groups, out]."""
    codes, errors = torch.empty_like(x), torch.zeros_like(x)
    weight, factor = U.diagonal().square().reciprocal(), inverse(scale)
    for at in range(0, len(x), grid.step):
        to, g = at + grid.step, at // grid.group
        w = torch.addmm(x[at:to], U[:at, at:to].t(), errors[:at], alpha=-1)
        codes[at:to] = grid.nearest((w * factor[g]).t(), weight[at:to]).t().mul_(scale[g] != 0)
        # E Uss = error for rows, here transposed
        error = torch.addcmul(w, codes[at:to], scale[g], value=-1)
        errors[at:to] = torch.linalg.solve_triangular(U[at:to, at:to].t(), error, upper=False)
    return codes, errors
