"""A comparison as tables for the terminal, Markdown and CSV, and as pictures (`billhook.reports.charts`)."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.comparison.record import Cell, Comparison, budget, method, summary
from billhook.reports.charts import Axis, Series, chart
from billhook.reports.pictures import BLOCK, ERROR, SPARSITY
from billhook.store.files import write_text

MARKDOWN, CSV = "compare.md", "compare.csv"
Rows = list[list[str]]


def perplexity_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows, one row per method, one column per pattern and sparsity: means over seeds with their standard
    deviation, the best of a column marked *."""
    found = summary(comparison.cells)
    budgets, methods = (list(dict.fromkeys(name(row) for row in found)) for name in (budget, method))
    shown = {(method(row), budget(row)): row for row in found}
    best = {b: min((row["mean_nll"] for row in found if budget(row) == b), default=None) for b in budgets}
    rows = [["dense", *[_ppl(comparison.dense.get("token_ppl"))] * len(budgets)]]
    for name in methods:
        cells = [shown.get((name, b)) for b in budgets]
        rows.append([name, *(_score(row, row is not None and row["mean_nll"] == best[budget(row)]) for row in cells)])
    return ["token perplexity", *budgets], rows


def _score(row: Mapping[str, Any] | None, best: bool) -> str:
    if row is None:
        return "-"
    spread = "" if row["spread_token_ppl"] is None else f" ± {row['spread_token_ppl']:.2f}"
    return _ppl(row["mean_token_ppl"]) + spread + (" *" if best else "")


def _ppl(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.2f}"


def error_tables(comparison: Comparison) -> dict[str, tuple[list[str], Rows]]:
    """Title -> header and rows, for each pattern and sparsity: the error of each block's output, one column per
    method."""
    found = {}
    for name, cells in _first_seeds(comparison).items():
        rows = [[str(block)] for block in range(len(cells[0]["error_by_block"]))]
        for cell in cells:
            for row, error in zip(rows, cell["error_by_block"], strict=True):
                row.append(f"{error:.4g}")
        found[f"Relative squared error of each block's output at {name}"] = (["block", *map(method, cells)], rows)
    return found


def caption(comparison: Comparison) -> str:
    """Which model, protocol and text the numbers are from."""
    data, model = comparison.identity["data"], comparison.identity["model"]["name"]
    text = f"{data['windows']} windows of {data['length']} tokens of {data['source']}"
    marks = "± is the standard deviation over calibration seeds, * the best of a column."
    return f"{model}: {comparison.identity['protocol']}, {text}; {marks}"


def markdown(comparison: Comparison) -> str:
    """The table of perplexities, and the differences between methods where there are several seeds, as Markdown."""
    header, rows = perplexity_table(comparison)
    lines = [f"# Comparison of {comparison.identity['model']['name']}", "", caption(comparison), ""]
    lines += _markdown([header, ["---", *["---:"] * (len(header) - 1)], *rows])
    if found := comparison.to_json()["differences"]:
        lines += ["", "## Differences and the spread over seeds", "", "Losses in nats per token.", ""]
        header = ["at", "better", "worse", "difference", "spread", "larger than the spread"]
        rows = []
        for row in found:
            numbers = [f"{row[key]:.4f}" for key in ("difference_nll", "spread_nll")]
            larger = "yes" if row["larger_than_spread"] else "no"
            rows.append([budget(row), row["better"], row["worse"], *numbers, larger])
        lines += _markdown([header, ["---"] * 3 + ["---:"] * 2 + ["---"], *rows])
    return "\n".join(lines) + "\n"


def _markdown(rows: Rows) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


def spreadsheet(comparison: Comparison) -> str:
    """One line per cell, as CSV."""
    out = io.StringIO()
    columns = [*Cell._fields, "token_ppl", "nll", "achieved"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison.cells)
    return out.getvalue()


def pictures(comparison: Comparison) -> dict[str, str]:
    """File stem -> SVG: perplexity by sparsity, and for each pattern and sparsity the sparsity and the output error by
    block."""
    found = {}
    if (by_sparsity := _perplexity_by_sparsity(comparison)) is not None:
        found["perplexity"] = by_sparsity
    depth = Axis(BLOCK, whole=True)
    for name, cells in _first_seeds(comparison).items():
        stem = name.replace(" %", "").replace(":", "of")
        plans = {row["allocator"]: row["sparsity_by_block"] for row in cells}
        lines = [Series(a, list(map(int, s)), [100 * v for v in s.values()]) for a, s in plans.items()]
        about: dict[str, Any] = {"summary": "A line for each allocation.", "standalone": True}
        found[f"sparsity-{stem}"] = chart(f"Sparsity by block at {name}", lines, depth, SPARSITY, **about)
        lines = [Series(method(row), range(len(row["error_by_block"])), row["error_by_block"]) for row in cells]
        about["summary"] = "A line for each method."
        found[f"error-{stem}"] = chart(f"Error of each block's output at {name}", lines, depth, ERROR, **about)
    return found


def _perplexity_by_sparsity(comparison: Comparison) -> str | None:
    """One line per method; None where there is a single sparsity."""
    rows = [row for row in summary(comparison.cells) if row["pattern"] == "unstructured"]
    sparsities = sorted({100 * row["sparsity"] for row in rows})
    if len(sparsities) < 2:
        return None
    methods = dict.fromkeys(map(method, rows))
    lines = [_line(name, [row for row in rows if method(row) == name]) for name in methods]
    dense = comparison.dense.get("token_ppl")
    lines.append(Series("dense", sparsities, [dense] * len(sparsities), marks=False, dashed=True))
    title = f"Token perplexity of {comparison.identity['model']['name']} by sparsity"
    axes = Axis("sparsity (%)"), Axis("token perplexity (lower is better)", log=True)
    return chart(title, lines, *axes, summary="A line for each method.", standalone=True)


def _line(name: str, rows: Sequence[Mapping[str, Any]]) -> Series:
    x, y, spread = ([row[key] for row in rows] for key in ("sparsity", "mean_token_ppl", "spread_token_ppl"))
    x = [100 * sparsity for sparsity in x]
    if None in spread:
        return Series(name, x, y)
    low, high = ([v + sign * s for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
    return Series(name, x, y, low, high)


def _first_seeds(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """The rows of the first seed, by pattern and sparsity."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in comparison.cells:
        rows = found.setdefault(budget(row), [])
        if not rows or row["seed"] == rows[0]["seed"]:
            rows.append(row)
    return found


def write_views(comparison: Comparison) -> list[str]:
    """Write Markdown, CSV and pictures next to compare.json; returns the names of the files."""
    assert comparison.folder is not None
    texts = {MARKDOWN: markdown(comparison), CSV: spreadsheet(comparison)}
    texts |= {f"{stem}.svg": picture for stem, picture in pictures(comparison).items()}
    for name, text in texts.items():
        write_text(comparison.folder / name, text)
    return list(texts)
