"""Spectra: the eigenvalues of W^T W of one weight, and the metrics that need nothing else.

The eigenvalues are the squared singular values, as in AlphaPruning (arXiv 2410.10912, data free) and WeightWatcher; exponents are in
`billhook.tails`, names, signs and sources in `billhook.metrics`. Everything is float64, whatever the dtype of the weight.

Many layers are measured side by side with one thread each: the eigensolver gains little from a second thread, and loses much where
threads wait for each other on a busy machine.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.metrics import METRICS, fact
from billhook.registry import method
from billhook.tails import LogBound, Spectrum, TailFit, fit_tail

__all__ = ["Spectrum", "TailFit", "eigenvalues", "error_bound", "fit_tail", "measure_spectra", "spectral_metrics"]

EPS = torch.finfo(torch.float64).eps
ACCURACY = 1e-2  # relative error allowed to the smallest eigenvalue, which only sets the histogram's edge
PANEL = 256  # rows of the Gram matrix per product
DEPTH = 2048  # columns of W converted to float64 at a time
MEMORY = 2 * 2**30  # bytes that layers measured side by side may use together


class Weighted(Protocol):
    """What is asked of a layer: its name, shape [out, in] and weight."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def weight(self) -> Tensor: ...


def eigenvalues(W: Tensor, method: Literal["auto", "svd", "gram"] = "auto") -> Tensor:
    """Eigenvalues of W^T W: squared singular values of `W` [out, in] (any float dtype), ascending float64 [min(out, in)].

    `gram` forms W W^T or W^T W, whichever is smaller, in float64 and takes its eigenvalues. Each is within

        |computed - exact| <= 4 sqrt(max(out, in)) eps64 l_max          (`error_bound`)

    which is the normwise backward error of the product and of the symmetric solver when rounding errors do not conspire (Higham & Mary
    2019; the largest seen is half of it); values within it of zero become 0. `svd` uses float64 singular values: relative accuracy
    eps64 sqrt(l_max / l), and only those below (max(out, in) eps64)^2 l_max become 0. `auto` is `gram`, unless its bound exceeds a
    hundredth of the smallest eigenvalue; then it is `svd`. (The float32 singular values of the published code are off by more than that
    hundredth as soon as l < 1e-9 l_max; the bound of `gram` gets there at 6e-12 for 4096 columns, and only for the l concerned.)

    Raises BillhookError for a weight that is not a matrix, is empty, or holds NaN, inf or values whose squares overflow.
    """
    if W.ndim != 2 or 0 in W.shape:
        raise BillhookError(f"A spectrum needs a matrix with at least one row and column, got shape {tuple(W.shape)}.")
    if method != "svd":
        gram = _lower_gram(W if W.shape[0] <= W.shape[1] else W.T)
        _check_finite(gram.diagonal())
        evals = torch.linalg.eigvalsh(gram)
        bound = error_bound(W.shape, float(evals[-1]))
        if method == "gram" or bound <= ACCURACY * float(evals[0]) or evals[-1] <= 0:
            return torch.where(evals > bound, evals, 0.0)
    W = W.double()
    _check_finite(W.square().sum(0))
    evals = torch.linalg.svdvals(W).square().flip(0)
    return torch.where(evals > (max(W.shape) * EPS) ** 2 * evals[-1], evals, 0.0)


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


def spectral_metrics(W: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Compute the spectrum of `W` [out, in] once and from it the metrics called `names`, in their order.

    A parameter may follow a name after a colon (`alpha_peak:repaired`). Every value is finite. Raises BillhookError for an unknown or
    non-spectral name before anything is computed, for a weight without a spectrum, and for a metric that does not exist for it.
    """
    calls = {name: (METRICS.get(fact(name).name), _options(name)) for name in names}
    spectrum = Spectrum(eigenvalues(W))
    return {name: function(spectrum, **options) for name, (function, options) in calls.items()}


def measure_spectra(
    layers: Sequence[Weighted], names: Sequence[str], done: Callable[[str], None] = lambda layer: None
) -> dict[str, dict[str, float]]:
    """`spectral_metrics` of many layers, by layer name; as many at once as torch may use threads and MEMORY allows.

    `done` is called in the calling thread with the name of each layer as it ends, in order. Errors name the layer. While this runs,
    torch's threads are divided among the layers, process-wide.
    """
    for name in names:
        _options(name)
    threads = torch.get_num_threads()
    workers = min(threads, max(1, MEMORY // max((_bytes(layer.shape) for layer in layers), default=1)))
    if any(layer.weight.device.type != "cpu" for layer in layers):
        workers = 1
    share = threads // workers
    torch.set_num_threads(share)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            jobs = {layer.name: pool.submit(spectral_metrics, layer.weight, names) for layer in layers}
            try:
                return {name: _result(name, job, done) for name, job in jobs.items()}
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


def _bytes(shape: tuple[int, int]) -> int:
    """Memory for the spectrum of a [out, in] weight: the Gram matrix, the solver's copy, a part of the weight in float64."""
    small, large = sorted(shape)
    return 8 * small * (2 * small + min(DEPTH, large))


def _result(layer: str, job: Future[dict[str, float]], done: Callable[[str], None]) -> dict[str, float]:
    try:
        values = job.result()
    except BillhookError as error:
        raise type(error)(f"{layer}: {error}") from None
    done(layer)
    return values


def _options(name: str) -> dict[str, Any]:
    """The parameter after the colon of a metric's name as its one option."""
    known = fact(name)
    if not known.spectral:
        raise BillhookError(f"Metric {known.name!r} is not read off a spectrum: it needs calibration data.")
    _, colon, value = name.partition(":")
    options = list(METRICS.options(known.name))
    if colon and not options:
        raise BillhookError(f"Metric {known.name!r} takes no parameter, got {name!r}.")
    return METRICS.configure(known.name, {options[0]: value}) if colon else {}


def _metric(function: Any) -> Any:
    return method(paper=fact(function.__name__).paper)(function)


@_metric
def alpha_mid(spectrum: Spectrum) -> float:
    """Exponent of the upper half of the spectrum."""
    return spectrum.fit("mid").alpha


@_metric
def alpha_peak(spectrum: Spectrum, *, log_bound: LogBound = "published") -> float:
    """Exponent at the best cut not above 1.5 times the modal eigenvalue; `log_bound="repaired"` also bounds it from below."""
    return spectrum.fit("peak", log_bound).alpha


@_metric
def alpha_ks(spectrum: Spectrum) -> float:
    """Exponent at the best of all cuts."""
    return spectrum.fit("ks").alpha


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
    """Largest eigenvalue l_max of W^T W (the square of the largest singular value, as the published code has it)."""
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
        raise BillhookError("The logarithm of the norm of an all-zero weight does not exist. Leave the layer out, or use another metric.")
    return math.log10(value)
