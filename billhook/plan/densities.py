"""Spectral densities of a few layers, from quantiles of their spectra. No torch.

The quantiles are the curve `spectrum_quantiles` of a table. Between two of them the share of eigenvalues is
interpolated linearly in the logarithm.
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
    """Layer -> quantiles of its spectrum, for up to three layers with this curve: those with the smallest, median and
    largest value of the table's first spectral column, or the first, middle and last one."""
    rows = [row for row in table if CURVE in row.curves]
    columns = [name for name in table.columns() if of_weights(name)]
    ordered = sorted(rows, key=lambda row: row.metrics[columns[0]]) if columns else rows
    chosen = [ordered[place] for place in sorted({0, len(ordered) // 2, len(ordered) - 1})] if ordered else []
    return {row.layer: list(row.curves[CURVE]) for row in chosen}


def of_weights(name: str) -> bool:
    """Whether a column describes the weights alone, other than the KS distance of an exponent's fit."""
    base = name.partition(":")[0]
    return base in FACTS and not FACTS[base].needs_text and not (base.endswith("_ks") and base != "alpha_ks")


def spectra_of(table: Table, report: Mapping[str, Any]) -> dict[str, Any]:
    """The `spectra` of report.json, from a table of the dense model; raises BillhookError for another model's table."""
    digest = report["model"].get("digest")
    if digest is None or table.model.get("digest") != digest:
        name = report["model"].get("name")
        raise BillhookError(f"The table is not of the model that was pruned ({name}): use billhook measure on that.")
    part = table.only([row["layer"] for row in report["layers"]], table.shapes)
    columns = [name for name in part.columns() if of_weights(name)]
    if not columns and not shown(part):
        raise BillhookError("The table has no spectra: make one with billhook measure MODEL --metrics alpha_peak.")
    metrics = {name: dict(zip(part.shapes, part.column(name), strict=True)) for name in columns}
    return {"metrics": metrics, "quantiles": shown(part)}


def density(quantiles: Sequence[float]) -> tuple[list[float], list[float]]:
    """Geometric middles and heights (fractions per unit) of BINS bins of equal logarithmic width.

    Both are empty for a spectrum without two different positive values.
    """
    logs = [math.log(value) for value in quantiles if value > 0]
    if len(logs) < 2 or logs[-1] <= logs[0]:
        return [], []
    edges = [logs[0] + (logs[-1] - logs[0]) * i / BINS for i in range(BINS)] + [logs[-1]]
    shares = [_share(logs, edge) for edge in edges]
    middles = [math.exp((a + b) / 2) for a, b in pairwise(edges)]
    widths = [math.exp(b) - math.exp(a) for a, b in pairwise(edges)]
    return middles, [(b - a) / width for (a, b), width in zip(pairwise(shares), widths, strict=True)]


def _share(logs: Sequence[float], at: float) -> float:
    """The share of values at or below `at`."""
    place = bisect_right(logs, at)
    if place in (0, len(logs)):
        return float(place > 0)
    low, high = logs[place - 1], logs[place]
    return (place - 1 + (at - low) / (high - low)) / (len(logs) - 1)
