"""Spectral densities from the quantiles of spectra: which layers are shown, and how their eigenvalues are spread. No
torch.

The quantiles are the curve `spectrum_quantiles` of a table. Between two of them the share of eigenvalues is
interpolated linearly in the logarithm, so the density is that of a histogram whose counts are good to one part in the
number of quantiles.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.metrics import FACTS
from billhook.plan.table import Table

CURVE = "spectrum_quantiles"
BINS = 24


def shown(table: Table) -> dict[str, list[float]]:
    """Layer -> quantiles of its spectrum for up to three layers: of the smallest, the middle and the largest exponent,
    by the table's first spectral column, or the first, the middle and the last layer where it has none. Empty where the
    curve was not measured."""
    rows = [row for row in table if CURVE in row.curves]
    columns = [name for name in table.columns() if of_weights(name)]
    ordered = sorted(rows, key=lambda row: row.metrics[columns[0]]) if columns else rows
    chosen = [ordered[place] for place in sorted({0, len(ordered) // 2, len(ordered) - 1})] if ordered else []
    return {row.layer: list(row.curves[CURVE]) for row in chosen}


def of_weights(name: str) -> bool:
    """Whether a column says something about the weights alone, and is not merely the misfit of an exponent."""
    base = name.partition(":")[0]
    return base in FACTS and not FACTS[base].needs_text and not (base.endswith("_ks") and base != "alpha_ks")


def spectra_of(table: Table, report: Mapping[str, Any]) -> dict[str, Any]:
    """What report.json keeps of a table of the dense model (`spectra`); raises BillhookError unless it is of the model
    that was pruned."""
    digest = report["model"].get("digest")
    if digest is None or table.model.get("digest") != digest:
        raise BillhookError(
            f"The table is not of the model that was pruned here ({report['model'].get('name')}): their digests "
            "differ. "
            "Measure the dense model with billhook measure."
        )
    part = table.only([row["layer"] for row in report["layers"]], table.shapes)
    columns = [name for name in part.columns() if of_weights(name)]
    if not columns and not shown(part):
        raise BillhookError(
            "The table says nothing about spectra: make one with billhook measure MODEL --metrics alpha_peak."
        )
    return {
        "metrics": {name: dict(zip(part.shapes, part.column(name), strict=True)) for name in columns},
        "quantiles": shown(part),
    }


def density(quantiles: Sequence[float]) -> tuple[list[float], list[float]]:
    """Middles (geometric) and heights of BINS bins that are equally wide in the logarithm; empty for a spectrum without
    two different positive values. A height is the share of eigenvalues per unit."""
    logs = [math.log(value) for value in quantiles if value > 0]
    if len(logs) < 2 or logs[-1] <= logs[0]:
        return [], []
    edges = [logs[0] + (logs[-1] - logs[0]) * i / BINS for i in range(BINS)] + [logs[-1]]
    shares = [_share(logs, edge) for edge in edges]
    middles = [math.exp((a + b) / 2) for a, b in pairwise(edges)]
    widths = [math.exp(b) - math.exp(a) for a, b in pairwise(edges)]
    return middles, [(b - a) / width for (a, b), width in zip(pairwise(shares), widths, strict=True)]


def _share(logs: Sequence[float], at: float) -> float:
    """The share of values below `at`, or at it."""
    place = bisect_right(logs, at)
    if place in (0, len(logs)):
        return float(place > 0)
    low, high = logs[place - 1], logs[place]
    return (place - 1 + (at - low) / (high - low)) / (len(logs) - 1)
