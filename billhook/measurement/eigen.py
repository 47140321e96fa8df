"""Eigenvalues: all of WᵀW, without eigenvectors, in float64 accuracy.

The Gram matrix of the smaller side costs a fraction of a singular value decomposition but squares the condition number:
eigenvalues that are small compared with the rounding error of the largest are lost. Here the error is bounded, by 4
√max(out, in) · 2.2e-16 · λ_max. Eigenvalues for which that is more than 1 % are computed again from W itself, because
the smallest one sets the edge of the histogram from which `alpha_peak` is cut.

Weights in float32 or less with both sides at least 2048 use float32 for the Gram matrix and the solver, at half the
cost, and the 8 smallest eigenvalues are computed from W in float64. Observed errors are 1e-9 to 1e-8 λ_max below the
median (5e-7 λ_max at the top) and 3e-6 in alpha. The 8 also measure the error: if it exceeds a quarter of the largest
of them, or if the weight is rank-deficient, everything is computed in float64.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.measurement.smallest import smallest

EPS = torch.finfo(torch.float64).eps
ACCURACY = 1e-2  # relative error allowed to the smallest eigenvalues by the bound (seen: a hundredth of it)
PANEL = 256  # rows of the Gram matrix per product
DEPTH = 2048  # columns of W converted to float64 at a time
ITERATIONS = 40
SINGLE = 2048  # smaller sides are cheap in float64
PROBES = 8  # smallest eigenvalues that are computed again in float64 for a float32 spectrum
FIRM = 3e-5  # smallest eigenvalues above this share of the largest need no probes
DRIFT = 0.25  # a float32 error above this share of the largest probe sends a weight to float64
NORMAL = (1e-20, 1e30)  # range of the largest eigenvalue in which float32 can represent the small ones too


def eigenvalues(W: Tensor, method: Literal["auto", "svd", "gram"] = "auto") -> Tensor:
    """Eigenvalues of W^T W for `W` [out, in] (any float dtype), ascending float64 [min(out, in)].

    `gram` forms W W^T or W^T W, whichever is smaller, in float64 and takes its eigenvalues. Each is within

        |computed - exact| <= 4 sqrt(max(out, in)) eps64 l_max          (`error_bound`)

    which is the probabilistic normwise backward error of the product and the symmetric solver (Higham & Mary 2019; the
    largest error seen is half of it); values below the bound become 0. `svd` uses float64 singular values: relative
    accuracy about eps64 sqrt(l_max / l), and values below (max(out, in) eps64)^2 l_max become 0. `auto` is `gram`, but
    computes eigenvalues for which the bound exceeds 1 % again by inverse iteration on W's triangular factor (as
    accurate as `svd`); if they are more than an eighth of all or W is singular to rounding, it is `svd`. For weights in
    float32 or less with both sides at least 2048, `auto` first tries float32 (`_single`), within about 1e-8 l_max, and
    1e-6 relative for the smallest eigenvalue.

    Raises BillhookError for a weight that is no matrix, is empty, or holds NaN, inf or values whose squares overflow.
    """
    if W.ndim != 2 or 0 in W.shape:
        raise BillhookError(f"A spectrum needs a matrix with at least one row and column, got shape {tuple(W.shape)}.")
    if W.shape[0] > W.shape[1]:
        W = W.T
    if method == "auto" and len(W) >= SINGLE and W.dtype in (torch.float32, torch.bfloat16, torch.float16):
        evals = _single(W)
        if evals is not None:
            return evals
    if method != "svd":
        gram = _lower_gram(W)
        _check_finite(gram.diagonal())
        evals = torch.linalg.eigvalsh(gram)
        bound = error_bound(W.shape, float(evals[-1]))
        if method == "gram" or evals[-1] <= 0:
            return torch.where(evals > bound, evals, 0.0)
        doubtful = int((evals < bound / ACCURACY).sum())
        del gram
        smallest = _smallest(W, doubtful) if doubtful <= len(evals) // 8 else None
        if smallest is not None:
            return torch.cat([smallest, evals[doubtful:]]).sort().values
    W = W.double()
    _check_finite(W.square().sum(1))
    evals = torch.linalg.svdvals(W).square().flip(0)
    return torch.where(evals > _noise(W.shape) * evals[-1], evals, 0.0)


def _single(W: Tensor) -> Tensor | None:
    """The spectrum of `W` [n, m], n <= m, from a float32 Gram matrix, with its smallest values from W in float64.

    None where that is not accurate: outside the range of float32, rank-deficient, or with too large measured errors.
    """
    gram = _lower_gram(W, torch.float32)
    if not gram.diagonal().isfinite().all():
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with two the solver is no faster, and its errors were seen to be 40 times as large
    try:
        evals = torch.linalg.eigvalsh(gram).double()
    finally:
        torch.set_num_threads(threads)
    largest = float(evals[-1])
    if not NORMAL[0] < largest < NORMAL[1]:
        return None
    if evals[0] > FIRM * largest:
        return evals
    probes = smallest(W, gram, largest, PROBES)
    if (
        probes is None
        or probes[0] <= 1e4 * _noise(W.shape) * largest
        or (evals[:PROBES] - probes).abs().max() > DRIFT * probes[-1]
    ):
        return None
    return torch.cat([probes, evals[PROBES:]]).sort().values


def _smallest(W: Tensor, count: int) -> Tensor | None:
    """The `count` smallest squared singular values of `W` [n, m], n <= m, ascending; None if they do not converge.

    Subspace iteration on (R^T R)^-1 with W^T = Q R, so that the condition number of W is not squared. The subspace is
    larger than `count`, so that the last values converge too.
    """
    if count == 0:
        return W.new_empty(0, dtype=torch.float64)
    R = torch.linalg.qr(W.T.double(), mode="r").R
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(R), min(2 * count + 16, len(R)), generator=generator, dtype=R.dtype).to(R.device)
    values = None
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(torch.linalg.solve_triangular(R.T, torch.linalg.qr(basis).Q, upper=False)).Q
        basis = torch.linalg.solve_triangular(R, basis, upper=True)
        if not basis.isfinite().all():
            return None
        last, values = values, torch.linalg.svdvals(R @ torch.linalg.qr(basis).Q).square().flip(0)[:count]
        if values[0] <= 1e4 * _noise(W.shape) * R.square().sum():
            return None
        if last is not None and ((values - last).abs() <= ACCURACY / 100 * values).all():
            return values
    return None


def _noise(shape: Sequence[int]) -> float:
    """Squared singular values below this share of the largest are indistinguishable from 0 in float64."""
    return (max(shape) * EPS) ** 2


def error_bound(shape: Sequence[int], largest: float) -> float:
    """The largest error of an eigenvalue from the Gram matrix of a [out, in] weight; see `eigenvalues`."""
    return 4 * math.sqrt(max(shape)) * EPS * largest


def _lower_gram(W: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The lower triangle of W W^T (the rest is unspecified), with half the work of a product."""
    size = W.shape[0]
    gram = torch.zeros(size, size, dtype=dtype, device=W.device)
    for column in range(0, W.shape[1], DEPTH):
        part = W[:, column : column + DEPTH].to(dtype)
        for start in range(0, size, PANEL):
            stop = min(start + PANEL, size)
            gram[start:stop, :stop].addmm_(part[start:stop], part[:stop].T)
    return gram


def _check_finite(squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise BillhookError("The weight holds NaN or inf, or its squares overflow. Repair the checkpoint.")
