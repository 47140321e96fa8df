"""Metrics of the weights alone: one spectrum a layer, many layers at a time.

Layers are measured side by side with one thread each: the eigensolver gains little from a second thread, and loses much
where threads wait for each other on a busy machine.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.measurement import function_of, options_of
from billhook.measurement.eigen import DEPTH, eigenvalues
from billhook.measurement.tails import Spectrum
from billhook.plan.metrics import fact

MEMORY = 2 * 2**30  # bytes that layers measured side by side may use together


class _Weighted(Protocol):
    """What is asked of a layer: its name, shape [out, in] and weight."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def weight(self) -> Tensor: ...


def spectral_metrics(W: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Compute the spectrum of `W` [out, in] once and from it the metrics called `names`, in their order; others that
    read only the weight are computed beside.

    A parameter may follow a name after a colon (`alpha_peak:repaired`). Every value is finite. Raises BillhookError for
    an unknown name or one that needs text before anything is computed, for a weight without a spectrum, and for a
    metric that does not exist for it.
    """
    calls = {name: (function_of(name), _options(name)) for name in names}
    spectrum = (
        Spectrum(eigenvalues(W), (W.shape[0], W.shape[1])) if any(fact(name).spectral for name in names) else None
    )
    return {
        name: function(spectrum if fact(name).spectral else W, **options) for name, (function, options) in calls.items()
    }


def measure_spectra(
    layers: Sequence[_Weighted], names: Sequence[str], done: Callable[[str], None] = lambda layer: None
) -> dict[str, dict[str, Any]]:
    """`spectral_metrics` of many layers, by layer name; as many at once as torch may use threads and MEMORY allows.

    `done` is called in the calling thread with the name of each layer as it ends, in order. Errors name the layer.
    While this runs, torch's threads are divided among the layers, process-wide.
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
    """Memory for the spectrum of a [out, in] weight: the Gram matrix, the solver's copy, a part of the weight in
    float64."""
    small, large = sorted(shape)
    return 8 * small * (2 * small + min(DEPTH, large))


def _result(layer: str, job: Future[dict[str, Any]], done: Callable[[str], None]) -> dict[str, Any]:
    try:
        values = job.result()
    except BillhookError as error:
        raise type(error)(f"{layer}: {error}") from None
    done(layer)
    return values


def _options(name: str) -> dict[str, Any]:
    """The parameter after the colon of a metric's name as its one option."""
    if fact(name).needs_text:
        raise BillhookError(f"Metric {fact(name).name!r} is not read off a spectrum: it needs calibration data.")
    return options_of(name)
