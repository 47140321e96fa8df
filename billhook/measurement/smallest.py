"""The few smallest singular values of a weight, accurately, when its Gram matrix is known in float32 only.

LOBPCG (Knyazev 2001, SIAM J. Sci. Comput. 23:517) with a float32 Cholesky factor of the shifted Gram matrix as
preconditioner. Rayleigh-Ritz in float64 uses W itself, so that its condition number is not squared.
"""

import torch
from torch import Tensor

EXTRA = 4  # additional vectors, so that the last values converge too
STEPS = 20
ROUGH = 6  # steps in float32 before the first in float64
SHIFTS = (3e-9, 3e-8)  # times the largest eigenvalue: keeps a float32 Gram matrix positive definite; smallest first
TOLERANCE = 1e-5  # relative, of the smallest
LOOSE = 1e-2  # relative, of the others
BLOCK = 512
COLUMNS = 1024


def smallest(W: Tensor, gram: Tensor, largest: float, count: int) -> Tensor | None:
    """The `count` smallest squared singular values of `W` [n, m], n <= m, ascending float64; None without convergence.

    Relative accuracy: about 1e-6 for the smallest, 1e-2 or better for the others. `gram` is the lower triangle of
    W W^T in float32, `largest` its largest eigenvalue.
    """
    factors = (_cholesky_(gram.clone(), shift * largest) for shift in SHIFTS)
    L = next((factor for factor in factors if factor is not None), None)
    if L is None:
        return None
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(len(W), count + EXTRA, generator=generator).to(W.device)
    for _ in range(ROUGH):
        X = torch.linalg.qr(_solve(L, X)).Q
    basis, last = X.double(), None
    images = _times(W.T, basis)
    allowed = torch.full((X.shape[1],), LOOSE, dtype=basis.dtype, device=W.device)
    allowed[0] = TOLERANCE
    for _ in range(STEPS):
        basis, R = torch.linalg.qr(basis)
        images = torch.linalg.solve_triangular(R, images, upper=True, left=False)
        C, values = _ritz(images, X.shape[1])
        if not values.isfinite().all():
            return None
        if last is not None and ((values - last).abs() <= allowed * values)[:count].all():
            return values[:count]
        last = values
        vectors, steps = basis @ C, C.clone()
        steps[: X.shape[1]] = 0
        residual = _times(W, images @ C) - vectors * values
        correction = _solve(L, (residual / residual.norm(dim=0).clamp_min(1e-300)).float()).double()
        correction /= correction.norm(dim=0)
        old = [] if basis.shape[1] == X.shape[1] else [steps / steps.norm(dim=0)]
        images = torch.cat([images @ C, *(images @ step for step in old), _times(W.T, correction)], 1)
        basis = torch.cat([vectors, *(basis @ step for step in old), correction], 1)
    return None


def _ritz(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Combinations [k, count] of an orthonormal basis with the shortest images [m, k], and their squared lengths."""
    found = torch.linalg.svd(torch.linalg.qr(images, mode="r").R)
    return found.Vh[-count:].T.flip(1), found.S[-count:].square().flip(0)


def _times(W: Tensor, X: Tensor) -> Tensor:
    """W X in float64, a slice of W converted at a time."""
    product = X.new_zeros(len(W), X.shape[1])
    for start in range(0, W.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        product.addmm_(W[:, columns].double(), X[columns])
    return product


def _solve(L: Tensor, X: Tensor) -> Tensor:
    """(L L^T)^-1 X."""
    return torch.linalg.solve_triangular(L.T, torch.linalg.solve_triangular(L, X, upper=False), upper=True)


def _cholesky_(gram: Tensor, shift: float) -> Tensor | None:
    """The Cholesky factor of gram + shift in its lower triangle, in place; None where that is not positive definite.

    By blocks, because the library's own factorization reaches half the speed of its products.
    """
    gram.diagonal().add_(shift)
    size = len(gram)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        factor, failed = torch.linalg.cholesky_ex(gram[start:stop, start:stop])
        if failed:
            return None
        gram[start:stop, start:stop] = factor
        panel = torch.linalg.solve_triangular(factor, gram[stop:, start:stop].T, upper=False).T
        gram[stop:, start:stop] = panel
        for row in range(stop, size, BLOCK):
            end = min(row + BLOCK, size)
            gram[row:end, stop:end].addmm_(panel[row - stop : end - stop], panel[: end - stop].T, alpha=-1)
    return gram
