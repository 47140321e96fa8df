"""The functions that measure metrics and curves, by name; facts about them are in `billhook.plan.metrics`. No torch."""

from collections.abc import Callable
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.metrics import fact
from billhook.registry import Registry

METRICS = Registry(
    "metric",
    {
        "alpha_peak": "billhook.measurement.spectra:alpha_peak",
        "alpha_mid": "billhook.measurement.spectra:alpha_mid",
        "alpha_ks": "billhook.measurement.spectra:alpha_ks",
        "entropy": "billhook.measurement.spectra:entropy",
        "stable_rank": "billhook.measurement.spectra:stable_rank",
        "alpha_hat": "billhook.measurement.spectra:alpha_hat",
        "log_alpha_norm": "billhook.measurement.spectra:log_alpha_norm",
        "spectral_norm": "billhook.measurement.spectra:spectral_norm",
        "log_spectral_norm": "billhook.measurement.spectra:log_spectral_norm",
        "frobenius_sq": "billhook.measurement.spectra:frobenius_sq",
        "log_norm": "billhook.measurement.spectra:log_norm",
        "mp_softrank": "billhook.measurement.spectra:mp_softrank",
        "alpha_peak_ks": "billhook.measurement.spectra:alpha_peak_ks",
        "alpha_mid_ks": "billhook.measurement.spectra:alpha_mid_ks",
        "alpha_ks_ks": "billhook.measurement.spectra:alpha_ks_ks",
        "alpha_farms": "billhook.measurement.farms:alpha_farms",
        "alpha_farms_mid": "billhook.measurement.farms:alpha_farms_mid",
        "randomized_distance": "billhook.measurement.randomized:randomized_distance",
        "outlier_ratio": "billhook.measurement.activations:outlier_ratio",
        "wanda_mean": "billhook.measurement.activations:wanda_mean",
        "wanda_median": "billhook.measurement.activations:wanda_median",
        "block_loss": "billhook.measurement.block_loss:block_loss",
        "loss_share": "billhook.measurement.loss_shares:loss_share",
        "spectrum_quantiles": "billhook.measurement.spectra:spectrum_quantiles",
        "magnitude_quantiles": "billhook.measurement.quantiles:magnitude_quantiles",
        "lamp_quantiles": "billhook.measurement.quantiles:lamp_quantiles",
        "wanda_quantiles": "billhook.measurement.quantiles:wanda_quantiles",
        "error_curve": "billhook.measurement.error_curves:error_curve",
    },
)


def function_of(name: str) -> Callable[..., Any]:
    """The function that computes a metric or curve, named with or without a parameter; this may import torch."""
    return METRICS.get(fact(name).name)


def options_of(name: str) -> dict[str, Any]:
    """The parameter after the colon as the metric's one option; raises BillhookError for one that it does not have."""
    base, colon, value = name.partition(":")
    if not colon:
        return {}
    options = list(METRICS.options(fact(name).name))
    if not options:
        raise BillhookError(f"Metric {base!r} takes no parameter, got {name!r}.")
    return METRICS.configure(base, {options[0]: value})


def canonical(name: str) -> str:
    """The name of the column, with the (default) number after the colon in its shortest form."""
    base = fact(name).name
    for key, option in METRICS.options(base).items():
        value = options_of(name).get(key, option.default)
        if isinstance(value, float):
            return f"{base}:{value:g}"
    return name
