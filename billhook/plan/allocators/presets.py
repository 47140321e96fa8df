"""Presets: published settings of an allocator, by name.

A name is METHOD[/MODEL][/CRITERION]@PERCENT, such as `alphapruning/llama-2-7b@70`; without a criterion the setting is
for Wanda. `--preset NAME` sets allocator, options and sparsity; `--set` and `--sparsity` override them.

Sources: AlphaPruning's published scripts (epsilon by model and criterion at 70 %), FARMS' scripts (epsilon of its
AlphaPruning baseline at 75, 80 and 85 %), OWL's README, DLP's paper.

Limits: the settings were chosen on the test text of WikiText-2, for these models. For other models they are a starting
point.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError
from billhook.registry import hint


@dataclass(frozen=True)
class Preset:
    """An allocator with its options and the sparsity they are for; `criterion` is the one it was published with."""

    allocator: str
    options: Mapping[str, Any]
    sparsity: float
    criterion: str
    paper: str


_EPSILON_70 = {  # model: epsilon for magnitude, wanda, sparsegpt
    "llama-7b": (0.3, 0.2, 0.2),
    "llama-13b": (0.5, 0.3, 0.3),
    "llama-30b": (0.4, 0.3, 0.3),
    "llama-65b": (0.4, 0.3, 0.3),
    "llama-2-7b": (0.5, 0.3, 0.2),
    "llama-2-13b": (0.4, 0.3, 0.3),
    "llama-2-70b": (0.4, 0.3, 0.3),
}
_EPSILON_HIGH = {  # model: criterion: epsilon at 75, 80, 85 %
    "llama-7b": {"magnitude": (0.3, 0.2, 0.15), "wanda": (0.2, 0.2, 0.1), "sparsegpt": (0.2, 0.1, 0.15)},
    "llama-13b": {"magnitude": (0.45, 0.3, 0.15), "wanda": (0.3, 0.3, 0.2), "sparsegpt": (0.3, 0.2, 0.2)},
}
_CRITERIA = ("magnitude", "wanda", "sparsegpt")


def _alphapruning() -> dict[str, Preset]:
    found = {}
    for model, epsilons in _EPSILON_70.items():
        settings = [(70, criterion, epsilon) for criterion, epsilon in zip(_CRITERIA, epsilons, strict=True)]
        for criterion, higher in _EPSILON_HIGH.get(model, {}).items():
            settings += [(per_cent, criterion, epsilon) for per_cent, epsilon in zip((75, 80, 85), higher, strict=True)]
        for per_cent, criterion, epsilon in settings:
            name = f"alphapruning/{model}" + ("" if criterion == "wanda" else f"/{criterion}") + f"@{per_cent}"
            source = ("Lu et al. 2024" if per_cent == 70 else "Hu et al. 2025 (FARMS)") + ", published scripts"
            options = {"metric": "alpha_peak", "epsilon": epsilon, "mapping": "block"}
            found[name] = Preset("alphapruning", options, per_cent / 100, criterion, source)
    return found


PRESETS: dict[str, Preset] = {
    **_alphapruning(),
    "owl/llama@70": Preset("owl", {"m": 5.0, "lam": 0.08}, 0.7, "wanda", "Yin et al. 2024, README"),
}
for _per_cent, _alpha in ((50, 0.04), (60, 0.1), (70, 0.15)):
    _options = {"alpha": _alpha, "statistic": "mean"}
    PRESETS[f"dlp@{_per_cent}"] = Preset("dlp", _options, _per_cent / 100, "wanda", "Chen et al. 2025")
OWL_GRID = {"lam": (0.02, 0.05, 0.08, 0.1, 0.2), "m": (3.0, 5.0, 7.0, 10.0)}  # EvoPress' code, arXiv:2410.14649


def preset(name: str) -> Preset:
    """The preset `name`; raises BillhookError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise BillhookError(f"Unknown preset {name!r}.{hint(name, PRESETS)} See: billhook ls presets.")
    return PRESETS[name]


def apply(
    name: str, allocator: str | None, sparsity: float | None, options: Mapping[str, Any]
) -> tuple[str, float, dict[str, Any]]:
    """Allocator, sparsity and options: those of a preset unless given; raises BillhookError for another allocator."""
    found = preset(name)
    if allocator is not None and allocator != found.allocator:
        raise BillhookError(f"The preset {name} is for the allocator {found.allocator}, not {allocator}.")
    return found.allocator, found.sparsity if sparsity is None else sparsity, {**found.options, **options}
