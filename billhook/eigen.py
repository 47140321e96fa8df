"""Eigenvalues of W^T W, all of them, without eigenvectors: the squared singular values of a weight, in float64.

The Gram matrix of the smaller side costs a fraction of a singular value decomposition but squares the condition number: what is
small beside rounding errors of the largest eigenvalue is lost. Here that loss is bounded, and the few eigenvalues it concerns are
found again from W itself, because the smallest sets the edge of the histogram from which AlphaPruning's `alpha_peak` is cut.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from billhook.errors import BillhookError

EPS = torch.finfo(torch.float64).eps
ACCURACY = 1e-2  # relative error allowed to the smallest eigenvalues by the bound (seen: a hundredth of it)
PANEL = 256  # rows of the Gram matrix per product
DEPTH = 2048  # columns of W converted to float64 at a time
ITERATIONS = 40


def eigenvalues(W: Tensor, method: Literal["auto", "svd", "gram"] = "auto") -> Tensor:
    """Eigenvalues of W^T W: squared singular values of `W` [out, in] (any float dtype), ascending float64 [min(out, in)].

    `gram` forms W W^T or W^T W, whichever is smaller, in float64 and takes its eigenvalues. Each is within

        |computed - exact| <= 4 sqrt(max(out, in)) eps64 l_max          (`error_bound`)

    which is the normwise backward error of the product and of the symmetric solver when rounding errors do not conspire (Higham & Mary
    2019; the largest seen is half of it); values within it of zero become 0. `svd` uses float64 singular values: relative accuracy
    about eps64 sqrt(l_max / l), and those below (max(out, in) eps64)^2 l_max become 0. `auto` is `gram`; eigenvalues of which the bound
    is more than a hundredth are computed again by inverse iteration on W's triangular factor (accurate as `svd`), and where those
    are an eighth of all or W is singular to rounding, `auto` is `svd`.

    Raises BillhookError for a weight that is not a matrix, is empty, or holds NaN, inf or values whose squares overflow.
    """
    if W.ndim != 2 or 0 in W.shape:
        raise BillhookError(f"A spectrum needs a matrix with at least one row and column, got shape {tuple(W.shape)}.")
    if W.shape[0] > W.shape[1]:
        W = W.T
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


def _smallest(W: Tensor, count: int) -> Tensor | None:
    """The `count` smallest squared singular values of `W` [n, m], n <= m, ascending; None where iteration cannot find them.

    Subspace iteration on (R^T R)^-1 with W^T = Q R, so that W's condition enters once and not squared. The subspace is wider than
    asked, which makes the last values converge too.
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
    """Squared singular values below this share of the largest cannot be told from 0 in float64."""
    return (max(shape) * EPS) ** 2


def error_bound(shape: Sequence[int], largest: float) -> float:
    """How far an eigenvalue from the Gram matrix of a [out, in] weight may lie from the exact one; see `eigenvalues`."""
    return 4 * math.sqrt(max(shape)) * EPS * largest


def _lower_gram(W: Tensor) -> Tensor:
    """W W^T in float64, its lower triangle only (what lies above is unspecified): half the work of a product, memory bounded by DEPTH."""
    size = W.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=W.device)
    for column in range(0, W.shape[1], DEPTH):
        part = W[:, column : column + DEPTH].double()
        for start in range(0, size, PANEL):
            stop = min(start + PANEL, size)
            gram[start:stop, :stop].addmm_(part[start:stop], part[:stop].T)
    return gram


def _check_finite(squares: Tensor) -> None:
    if not squares.isfinite().all():
        raise BillhookError(
            "The weight holds NaN or inf (or values whose squares overflow): its spectrum does not exist. Repair the checkpoint."
        )
