"""Spectral metrics: numbers computed from the eigenvalues of WᵀW alone.

The eigenvalues λ are the squared singular values of a weight W [out, in], ascending, N = min(out, in), in float64. No
calibration text is needed. Sources: AlphaPruning (Lu et al. 2024, arXiv:2410.10912) for the exponents; Martin, Peng &
Mahoney, "Predicting trends in the quality of state-of-the-art neural networks without access to training or testing
data", Nature Communications 12:4122, 2021 (WeightWatcher) for entropy and norms; Martin & Mahoney, JMLR 22:165, 2021
for `mp_softrank`.

    entropy            −Σ p ln p / ln rank,   p = λ / Σ λ        stable_rank   Σ λ / λ_max
    spectral_norm      λ_max                                     frobenius_sq  Σ λ
    log_spectral_norm  log10 λ_max                               log_norm      log10 Σ λ
    alpha_hat          alpha_ks · log10 λ_max                    log_alpha_norm  log10 Σ λ ^ alpha_ks
    mp_softrank        s² (√out + √in)² / λ_max,   s² the mean square of all weights

The exponents `alpha_mid`, `alpha_peak` and `alpha_ks` differ in where the tail begins, see below. `alpha_mid_ks`,
`alpha_peak_ks` and `alpha_ks_ks` are the KS distances of their fits and are measured with them. The curve
`spectrum_quantiles`, 129 quantiles of the positive eigenvalues, is measured with every spectral metric; reports draw
spectral densities from it.

Signs: for the shape of a spectrum (alpha, entropy, stable rank) larger values mean more sparsity, for norms smaller
values do.

Measured agreement: alphas within 6.1e-6 relative of AlphaPruning's published code. WeightWatcher 0.7.7 agrees to 1e-5
in every metric that both define in the same way. Its soft rank fits the variance to the bulk; here it is the mean
square of all weights, so that strong directions raise the edge. Both rank matrices from weak to strong structure alike.

Limits: a small alpha is a sign of training, not a proof of it. Alpha also depends on the shape of the matrix.
"""

import math
from typing import Any

import torch

from billhook.errors import BillhookError
from billhook.measurement.quantiles import quantiles
from billhook.measurement.tails import LogBound, Spectrum
from billhook.plan.metrics import fact
from billhook.registry import method


def _metric(function: Any) -> Any:
    return method(paper=fact(function.__name__).paper)(function)


@_metric
def alpha_mid(spectrum: Spectrum) -> float:
    """Exponent of the upper half of the spectrum."""
    return spectrum.fit("mid").alpha


@_metric
def alpha_peak(spectrum: Spectrum, *, log_bound: LogBound = "published") -> float:
    """Exponent at the best cut up to 1.5 times the modal eigenvalue; "repaired" bounds the cut from below, too."""
    return spectrum.fit("peak", log_bound).alpha


@_metric
def alpha_ks(spectrum: Spectrum) -> float:
    """Exponent at the best of all cuts."""
    return spectrum.fit("ks").alpha


@_metric
def alpha_mid_ks(spectrum: Spectrum) -> float:
    """KS distance of the fit of `alpha_mid`, in [0, 1]."""
    return spectrum.fit("mid").ks_distance


@_metric
def alpha_peak_ks(spectrum: Spectrum, *, log_bound: LogBound = "published") -> float:
    """KS distance of the fit of `alpha_peak`."""
    return spectrum.fit("peak", log_bound).ks_distance


@_metric
def alpha_ks_ks(spectrum: Spectrum) -> float:
    """KS distance of the fit of `alpha_ks`."""
    return spectrum.fit("ks").ks_distance


@_metric
def spectrum_quantiles(spectrum: Spectrum) -> list[float]:
    """The 129 quantiles (see `billhook.measurement.quantiles`) of the positive eigenvalues."""
    return quantiles(spectrum.positive if len(spectrum.positive) else spectrum.evals)


@_metric
def mp_softrank(spectrum: Spectrum) -> float:
    """s^2 (sqrt(out) + sqrt(in))^2 / l_max, s^2 the mean square of all weights: 1 for noise, 0 for a zero weight."""
    out, columns = spectrum.shape
    largest = spectral_norm(spectrum)
    edge = frobenius_sq(spectrum) / (out * columns) * (math.sqrt(out) + math.sqrt(columns)) ** 2
    return edge / largest if largest > 0 else 0.0


@_metric
def entropy(spectrum: Spectrum) -> float:
    """-sum p ln p / ln rank with p = l / sum l, in [0, 1]; 0 for rank one and for a zero weight."""
    values = spectrum.positive
    if len(values) < 2:
        return 0.0
    share = values / values.sum()
    return float(torch.special.entr(share).sum()) / math.log(len(values))


@_metric
def stable_rank(spectrum: Spectrum) -> float:
    """sum l / l_max, between 1 and the rank; 0 for a zero weight."""
    largest = spectral_norm(spectrum)
    return frobenius_sq(spectrum) / largest if largest > 0 else 0.0


@_metric
def spectral_norm(spectrum: Spectrum) -> float:
    """Largest eigenvalue l_max of W^T W (the square of the largest singular value, as in the published code)."""
    return float(spectrum.evals[-1])


@_metric
def frobenius_sq(spectrum: Spectrum) -> float:
    """sum l: the sum of squared weights."""
    return float(spectrum.evals.sum())


@_metric
def log_spectral_norm(spectrum: Spectrum) -> float:
    """log10 l_max."""
    return _log10(spectral_norm(spectrum))


@_metric
def log_norm(spectrum: Spectrum) -> float:
    """log10 sum l."""
    return _log10(frobenius_sq(spectrum))


@_metric
def alpha_hat(spectrum: Spectrum) -> float:
    """alpha_ks x log10 l_max ("alpha weighted")."""
    return alpha_ks(spectrum) * log_spectral_norm(spectrum)


@_metric
def log_alpha_norm(spectrum: Spectrum) -> float:
    """log10 sum l^alpha_ks."""
    return float(torch.logsumexp(alpha_ks(spectrum) * spectrum.positive.log(), 0)) / math.log(10)


def _log10(value: float) -> float:
    if value <= 0:
        raise BillhookError("The norm of an all-zero weight has no logarithm. Ignore the layer, or use another metric.")
    return math.log10(value)
