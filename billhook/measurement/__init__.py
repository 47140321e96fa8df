"""The functions that measure metrics and curves, by name; facts about them are in `billhook.plan.metrics`. No torch."""

from collections.abc import Callable
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.metrics import CURVES, FACTS, fact
from billhook.registry import Registry

_SPECTRA = "billhook.measurement.spectra"
_OTHERS = {
    "alpha_farms": "billhook.measurement.farms",
    "alpha_farms_mid": "billhook.measurement.farms",
    "randomized_distance": "billhook.measurement.randomized",
    "outlier_ratio": "billhook.measurement.activations",
    "wanda_mean": "billhook.measurement.activations",
    "wanda_median": "billhook.measurement.activations",
    "block_loss": "billhook.measurement.block_loss",
    "loss_share": "billhook.measurement.loss_shares",
    "magnitude_quantiles": "billhook.measurement.quantiles",
    "lamp_quantiles": "billhook.measurement.quantiles",
    "wanda_quantiles": "billhook.measurement.quantiles",
    "error_curve": "billhook.measurement.error_curves",
}
METRICS = Registry("metric", {name: f"{_OTHERS.get(name, _SPECTRA)}:{name}" for name in FACTS | CURVES})


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
