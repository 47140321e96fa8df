"""Metrics of the weights alone: one spectrum per layer, several layers in parallel.

Each layer uses one thread: the eigensolver gains little from a second one, and loses much on a busy machine.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from billhook.architectures.layers import Layer
from billhook.errors import BillhookError
from billhook.measurement import function_of, options_of
from billhook.measurement.eigen import DEPTH, eigenvalues
from billhook.measurement.tails import Spectrum
from billhook.plan.metrics import fact

MEMORY = 2 * 2**30  # bytes that the layers measured in parallel may use together


def spectral_metrics(W: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """The metrics `names` of `W` [out, in], by name: those of the spectrum, which is computed once, or of the weight.

    A parameter may follow a name after a colon (`alpha_peak:repaired`). Every value is finite. Raises BillhookError for
    an unknown name or one that needs text, and for a weight without a spectrum or this metric.
    """
    calls = {name: (function_of(name), _options(name)) for name in names}
    spectral = any(fact(name).spectral for name in names)
    spectrum = Spectrum(eigenvalues(W), (W.shape[0], W.shape[1])) if spectral else None
    return {name: call(spectrum if fact(name).spectral else W, **options) for name, (call, options) in calls.items()}


def measure_spectra(
    layers: Sequence[Layer], names: Sequence[str], done: Callable[[str], None] = lambda layer: None
) -> dict[str, dict[str, Any]]:
    """`spectral_metrics` by layer name, of as many layers at a time as torch's threads and MEMORY allow.

    `done` is called in the calling thread with the name of each finished layer, in order. Errors name the layer.
    Meanwhile torch's number of threads is lower for the whole process.
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
    """Memory for the spectrum of a weight: the Gram matrix, the solver's copy, and a part of the weight in float64."""
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
    """The parameter after the colon; raises BillhookError for a metric that needs text."""
    if fact(name).needs_text:
        raise BillhookError(f"Metric {fact(name).name!r} is not read off a spectrum: it needs calibration data.")
    return options_of(name)
