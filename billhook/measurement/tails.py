"""Power-law exponents: alpha of a spectrum, and where its tail begins.

As AlphaPruning's published code computes them (Lu et al. 2024, arXiv:2410.10912). For a tail that begins at the i-th of
N ascending eigenvalues λ, counted from 0, with n = N − i:

    alpha_i = 1 + n / (Σ_{j ≥ i} ln λ_j − n ln λ_i)                    (Hill estimator)
    D_i     = max_{j ≥ i} | 1 − (λ_j / λ_i)^(1 − alpha_i) − (j − i) / n |    (Kolmogorov-Smirnov distance)

    alpha_mid   i = ⌊N/2⌋
    alpha_ks    the i with the smallest D, the first if several have it
    alpha_peak  the i with the smallest D among those with log10(0.95 x) ≤ λ_i ≤ 1.5 x,
                x the left edge of the fullest of 100 equal bins of log10 λ

* The sum includes j = i, a term of zero that n counts. The textbook estimator has n − 1 terms; alpha − 1 differs by the
  factor n / (n − 1). We follow the published code.
* The lower bound of `alpha_peak` compares an eigenvalue with a logarithm. So it hardly ever applies, and it makes the
  result depend on the scale of W. Published numbers depend on it, so it is the default; `alpha_peak:repaired` compares
  with 0.95 x.
* Eigenvalues of zero are left out (the published code returns NaN), and so are cuts at which all remaining eigenvalues
  are equal to rounding. A weight with fewer than three positive eigenvalues has no exponent, which is an error that
  names the layer.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from billhook.errors import BillhookError

Cut = Literal["mid", "peak", "ks"]
LogBound = Literal["published", "repaired"]

BINS = 100
FLAT = 1e-9  # a tail whose eigenvalues agree to this relative difference has no exponent
ROWS = 128  # cuts per dense block: wide enough for fast kernels, narrow enough to stay in cache


@dataclass(frozen=True)
class TailFit:
    """A power law with exponent `alpha` for eigenvalues from `xmin`, the `cut_index`-th in ascending order."""

    alpha: float
    ks_distance: float
    xmin: float
    cut_index: int


class Spectrum:
    """Ascending eigenvalues [N] float64 >= 0 of W^T W; results that several metrics need are cached.

    `shape` is that of W, square by default. Zeros are left out of every fit. The fits raise BillhookError where no
    exponent exists: fewer than three positive eigenvalues, or all of them equal.
    """

    def __init__(self, evals: Tensor, shape: tuple[int, int] | None = None) -> None:
        self.evals = evals
        self.shape = shape or (len(evals), len(evals))

    @cached_property
    def positive(self) -> Tensor:
        """The eigenvalues that are not zero, ascending."""
        return self.evals[self.evals > 0]

    @cached_property
    def curve(self) -> tuple[Tensor, Tensor]:
        """`(alpha, D)` [P - 1] at every cut of the P positive eigenvalues; inf and 1 at flat cuts."""
        if len(self.positive) < 3:
            found = f"{len(self.positive)} of {len(self.evals)} are positive"
            raise BillhookError(f"A power-law exponent needs 3 positive eigenvalues; {found}. Ignore the layer.")
        logs = self.positive.log()
        alphas = hill(logs)
        if not alphas.isfinite().any():
            raise BillhookError("All eigenvalues are equal: there is no power-law exponent. Use another metric.")
        return alphas, ks_distances(logs, alphas)

    def fit(self, cut: Cut, log_bound: LogBound = "published") -> TailFit:
        """Fit the tail; the module's docstring defines the cuts. Raises BillhookError where no cut has an exponent."""
        alphas, distances = self.curve
        if cut == "mid":
            best = len(self.positive) // 2
        else:
            allowed = alphas.isfinite()
            if cut == "peak":
                allowed &= self._near_peak(log_bound)
            best = int(torch.where(allowed, distances, math.inf).argmin())
            if not allowed[best]:
                raise BillhookError("No cut near the mode of the spectrum has an exponent. Use alpha_ks or alpha_mid.")
        alpha = float(alphas[best])
        if not math.isfinite(alpha):
            raise BillhookError(
                f"All eigenvalues above the cut are equal: there is no alpha_{cut}. Use another metric."
            )
        cut_index = best + len(self.evals) - len(self.positive)
        return TailFit(alpha, float(distances[best]), float(self.positive[best]), cut_index)

    def _near_peak(self, log_bound: LogBound) -> Tensor:
        """Which cuts [P - 1] lie near the fullest bin of log10 of the eigenvalues."""
        logs = self.positive.log10()
        low, high = float(logs[0]), float(logs[-1])
        fullest = int(torch.histc(logs.cpu(), bins=BINS, min=low, max=high).argmax())
        mode: float = 10.0 ** (low + fullest * (high - low) / BINS)
        least = math.log10(0.95 * mode) if log_bound == "published" else 0.95 * mode
        values = self.positive[:-1]
        return (values >= least) & (values <= 1.5 * mode)


def hill(logs: Tensor) -> Tensor:
    """The exponent at each of the N - 1 cuts of ascending logarithms [N]; inf where the tail is flat to rounding."""
    logs = logs - logs[-1]  # so that short tails, where cancellation is strongest, are summed exactly
    counts = torch.arange(len(logs), 1, -1, dtype=logs.dtype, device=logs.device)
    sums = logs.flip(0).cumsum(0).flip(0)[:-1]
    alphas = 1 + counts / (sums - counts * logs[:-1])
    return torch.where(logs[:-1] < -FLAT, alphas, math.inf)


def ks_distances(logs: Tensor, alphas: Tensor) -> Tensor:
    """The KS distance at each of the N - 1 cuts of ascending logarithms [N]; 1 where alpha is infinite."""
    size = len(logs)
    index = torch.arange(size, dtype=logs.dtype, device=logs.device)
    scale = 1 / (size - index[:-1])
    decay = torch.where(alphas.isfinite(), 1 - alphas, 0.0)
    distances = torch.empty_like(alphas)
    for start in range(0, size - 1, ROWS):
        rows = slice(start, min(start + ROWS, size - 1))
        gap = (logs[None, start:] - logs[rows, None]).mul_(decay[rows, None]).exp_()
        gap.addcmul_(index[None, start:] - index[rows, None], scale[rows, None]).sub_(1).abs_()
        gap[:, : rows.stop - start].triu_()  # eigenvalues below the cut
        distances[rows] = gap.amax(1)
    return torch.where(alphas.isfinite(), distances, 1.0)
