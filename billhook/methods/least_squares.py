"""Least squares on a given support: the optimal values of the kept weights of all rows.

For a layer W [out, in] and H = X^T X (+ damping), the loss of a pruned V is the sum over rows of (w - v) H (w - v)^T.
On a row's support S the minimum solves H_SS v_S = (H w)_S. The width of the supports decides between two solvers:

* Up to `DIRECT` kept weights in a row: batched Cholesky factorizations of rows with supports of similar size, padded
  with the identity, in float64. The result is the optimum to about 1e-12.
* More: preconditioned (diagonal) conjugate gradients on all rows at once in the dtype of W, with one product with H a
  step. They start from the plain mask (V = W on the support), use the direction to a given initial guess first, and
  lower the loss at every step, so the result is never worse than the plain mask. They stop at a relative residual of
  `TOLERANCE` or after `steps` products.

`DIRECT` was chosen by counting operations, not by timing.

`shift_to_dense` moves the optimum towards the dense model (asymmetric calibration: Li et al. 2025, GPTAQ,
arXiv:2504.02692). With X' the inputs of the same tokens in the dense model, |X V^T - ((1 - dense_target) X W^T +
dense_target X' W^T)|^2 is minimal at V = W + dense_target W D (X^T X)^-1 with D = (X' - X)^T X, and grows with the
distance from there in the norm of X^T X: the same problem with these weights in place of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.errors import JobError
from billhook.methods.statistics import LayerStats

DOUBLE = 512  # inputs up to which the cost of float64 is negligible
DIRECT = 256  # kept weights in a row up to which its system is factorized
TOLERANCE = 1e-5
ATTEMPTS = 4  # to factorize, each with ten times the damping of the one before
_BYTES = 1 << 26  # of the matrices factorized in one batch
_ROWS = 1024  # that are shifted to the dense model at a time


@dataclass(frozen=True)
class Solution:
    """`weight` [out, in], zero off the support; `exact` if factorized.

    `residual` is the largest |(H (w - v))_S| of a row. If factorized it is relative to |(H w)_S|; else relative to that
    of the plain mask, both in the norm of 1 / diag(H), as computed by the recurrence of the conjugate gradients.
    """

    weight: Tensor
    residual: float
    exact: bool


def solve_support(W: Tensor, H: Tensor, keep: Tensor, start: Tensor | None = None, steps: int = 50) -> Solution | None:
    """Minimize the loss on the support `keep`, bool [out, in]; H [in, in] is at least as precise as W.

    `start` [out, in] is an initial guess, read on the support. Returns None if H is not numerically positive definite
    on the support of some row: raise the damping. Conjugate gradients always return a result.
    """
    if int(keep.sum(1).max()) <= DIRECT:
        return _factorize(W, H, keep)
    return _conjugate_gradients(W, H.to(W.dtype), keep, start, steps)


def shift_to_dense(
    W: Tensor, stats: LayerStats, dense_target: float, damping: float, U: Tensor | None = None
) -> Tensor:
    """W [out, in] shifted by the fraction `dense_target` towards the weights that best give the dense model's outputs.

    Reads stats.gram and, where the inputs have drifted, stats.drift and stats.stream_drift; `damping` is a fraction of
    the mean of gram's diagonal. `U` [in, in] is that of `inverse_factor`, if it is known. Raises JobError when the
    damped gram cannot be factorized.
    """
    if (stats.drift is None and stats.stream_drift is None) or dense_target == 0 or not stats.tokens:
        return W
    assert stats.gram is not None
    dtype = torch.float64 if U is None and W.shape[1] <= DOUBLE else W.dtype
    wanted = torch.zeros_like(W, dtype=dtype) if stats.drift is None else W.to(dtype) @ stats.drift.to(dtype)
    if stats.stream_drift is not None:
        wanted += stats.stream_drift
    if U is not None:
        for rows in wanted.split(_ROWS):
            rows.copy_(_times_inverse(rows, U))
        return torch.add(W, wanted, alpha=dense_target, out=wanted)
    H = stats.gram.to(dtype, copy=True)
    diagonal = H.diagonal()
    mean = diagonal.sum() / max(int((diagonal > 0).sum()), 1)
    diagonal.add_(max(damping, 1e-4) * mean.clamp_min(torch.finfo(H.dtype).tiny))
    L, failed = torch.linalg.cholesky_ex(H)
    if failed:
        raise JobError("The input statistics cannot be factorized: use --set dense_target=0, or more damping.")
    return torch.add(W, torch.cholesky_solve(wanted.T, L).T.to(W.dtype), alpha=dense_target)


def _times_inverse(X: Tensor, U: Tensor) -> Tensor:
    """X UᵀU for X [out, in] and an upper triangular U, in panels of columns that leave out most of its zeros."""
    panels = torch.arange(len(U)).split(max(-(-len(U) // 4), 64))
    parts = [slice(int(p[0]), int(p[-1]) + 1) for p in panels]
    X = torch.cat([X[:, p.start :] @ U[p, p.start :].t() for p in parts], 1)
    return torch.cat([X[:, : p.stop] @ U[: p.stop, p] for p in parts], 1)


def noise_share(columns: int, tokens: int) -> float:
    """By how much the Gram matrix of so many columns and tokens is shrunk towards its diagonal."""
    return columns / max(columns + tokens, 1)


def shrunk(gram: Tensor, share: float) -> Tensor:
    """A copy of a Gram matrix [in, in], shrunk by `share` towards its diagonal."""
    found = gram * (1 - share)
    found.diagonal().copy_(gram.diagonal())
    return found


def inverse_factor(gram: Tensor, dead: Tensor, damping: float, stats: LayerStats, share: float = 0.0) -> Tensor:
    """Return U [in, in], upper triangular with UᵀU = (H + damping * mean(diag))^-1, H = shrunk(gram, share).

    Inputs that are zero are decoupled, with 1 on the diagonal. While the factorization fails, the damping is raised
    tenfold, with a note; raises JobError if it still fails.
    """
    dead, used, failed = dead.flip(0), damping, torch.zeros((), dtype=torch.int32, device=gram.device)
    for _ in range(ATTEMPTS):
        # reversed, and stored by columns, so that all that follows is in place: at 14336 inputs it takes 0.8 GB
        H = reverse_(shrunk(gram, share)).t()
        diagonal = H.diagonal()
        mean = diagonal.sum() / max(int((~dead).sum()), 1)
        diagonal.copy_(torch.where(dead, 1.0, diagonal) + used * mean)
        torch.linalg.cholesky_ex(H, out=(H, failed))
        if not failed:
            break
        used = max(10 * used, 1e-4)
    else:
        raise JobError(
            f"the input statistics cannot be factorized, even with damping {used / 10:g}; use more calibration text, "
            "--dtype float32 or another method."
        )
    if used != damping:
        stats.note(f"damping raised from {damping:g} to {used:g}: the factorization failed below it")
    # with H = L L^T reversed, H = R R^T with R = L reversed, upper triangular; hence H^-1 = U^T U with U = R^-1
    return reverse_(invert_lower_(H).t()).t()


def reverse_(M: Tensor, rows: int = 256) -> Tensor:
    """Reverse the order of rows and columns of a square matrix in place, `rows` at a time."""
    half = len(M) // 2
    for start in range(0, half, rows):
        stop = min(start + rows, half)
        top, bottom = M[start:stop], M[len(M) - stop : len(M) - start]
        kept = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(kept)
    middle = M[half : len(M) - half]
    middle.copy_(middle.flip(0, 1))
    return M


def invert_lower_(L: Tensor, leaf: int = 256) -> Tensor:
    """Invert a lower triangular matrix in place, by halves; a third of the work of solving against the identity."""
    solve = torch.linalg.solve_triangular
    if len(L) <= leaf:
        return L.copy_(solve(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False))
    half = len(L) // 2
    A, B, C = L[:half, :half], L[half:, :half], L[half:, half:]
    B.copy_(solve(C, solve(A, B, upper=False, left=False), upper=False).neg_())
    invert_lower_(A, leaf)
    invert_lower_(C, leaf)
    return L


def loss(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """(w - v) H (w - v)^T of every row, [out], in the more precise of the dtypes."""
    D = (W - V).to(H.dtype)
    return ((D @ H) * D).sum(1)


def _factorize(W: Tensor, H: Tensor, keep: Tensor) -> Solution | None:
    """Batched Cholesky factorizations; rows are sorted by the size of their supports."""
    H, W64 = H.double(), W.double()
    wanted = W64 @ H
    V, counts = torch.zeros_like(W64), keep.sum(1)
    rows = counts.argsort(stable=True)
    columns = (~keep).to(torch.int8).argsort(dim=1, stable=True)  # kept columns first, in order
    at = 0
    while at < len(rows):
        # rows whose matrices fit into memory even if they are as wide as the widest
        size = max(1, _BYTES // (8 * max(int(counts[rows[-1]]), 1) ** 2))
        part = rows[at : at + size]
        at += size
        width = int(counts[part[-1]])
        if width == 0:
            continue
        index = columns[part, :width]
        real = torch.arange(width, device=W.device) < counts[part, None]
        A = H[index[:, :, None], index[:, None, :]] * (real[:, :, None] & real[:, None, :])
        A.diagonal(dim1=1, dim2=2).add_((~real).to(A.dtype))
        L, failed = torch.linalg.cholesky_ex(A)
        if failed.any():
            return None
        b = wanted[part].gather(1, index) * real
        V[part] = V[part].scatter(1, index, torch.cholesky_solve(b[:, :, None], L)[:, :, 0] * real)
    left, whole = ((part * keep).norm(dim=1) for part in ((W64 - V) @ H, wanted))
    return Solution(V.to(W.dtype), float((left / whole.clamp_min(torch.finfo(H.dtype).tiny)).max()), True)


def _conjugate_gradients(W: Tensor, H: Tensor, keep: Tensor, start: Tensor | None, steps: int) -> Solution:
    """Preconditioned conjugate gradients with at most `steps` products with H, that for the first residual included."""
    scale = keep / H.diagonal()
    tiny = torch.finfo(W.dtype).tiny
    V = W * keep
    residual = (W - V) @ H * keep
    first = norm = (residual * residual * scale).sum(1)
    direction = residual * scale if start is None else (start - V) * keep
    jump = start is not None
    for _ in range(1, steps):
        image = direction @ H * keep
        curvature = (direction * image).sum(1).clamp_min(tiny)
        length = ((direction * residual).sum(1) / curvature)[:, None]
        V.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        new = (residual * residual * scale).sum(1)
        if bool((new <= TOLERANCE**2 * first).all()):
            break
        # after the step towards the initial guess, restart with steepest descent
        direction = torch.addcmul(residual * scale, (new / norm.clamp_min(tiny) * (not jump))[:, None], direction)
        norm, jump = new, False
    return Solution(V, float((((residual * residual * scale).sum(1)) / first.clamp_min(tiny)).max().sqrt()), False)
