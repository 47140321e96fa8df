"""A comparison as tables for the terminal, Markdown and CSV, and as pictures (`billhook.reports.charts`)."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from billhook.comparison.record import (
    SCORES,
    TITLES,
    UNITS,
    Cell,
    Comparison,
    budget,
    measure_of,
    method,
    shown,
    summary,
)
from billhook.evaluation.scoring import each, measured
from billhook.reports.charts import Series, chart
from billhook.reports.pictures import BLOCK, ERROR, SPARSITY
from billhook.reports.scales import Axis
from billhook.store.files import write_text

MARKDOWN, CSV = "compare.md", "compare.csv"
Rows = list[list[str]]
EQUAL = 1e-5  # sparsities that differ by less are drawn as equal
_LOOKS = "A colour for each allocator, a kind of line for each criterion."


def score_table(comparison: Comparison) -> tuple[list[str], Rows]:
    """Header and rows, one row per method, one column per pattern and sparsity: means over seeds with their standard
    deviation, the best of a column marked *."""
    found = summary(comparison.cells)
    budgets, methods = (list(dict.fromkeys(name(row) for row in found)) for name in (budget, method))
    known = {(method(row), budget(row)): row for row in found}
    best = {b: min((row["mean_nll"] for row in found if budget(row) == b), default=None) for b in budgets}
    measure = measure_of(found[0]) if found else measure_of(comparison.dense)
    dense = comparison.dense.get(measure)
    rows = [["dense", *[shown(measure, dense)] * len(budgets)]]
    for name in methods:
        cells = [known.get((name, b)) for b in budgets]
        rows.append([name, *(_score(row, row is not None and row["mean_nll"] == best[budget(row)]) for row in cells)])
    return [TITLES[measure], *budgets], rows


def _score(row: Mapping[str, Any] | None, best: bool) -> str:
    if row is None:
        return "-"
    name = measure_of(row)
    spread = "" if row[f"spread_{name}"] is None else f" ± {shown(name, row[f'spread_{name}'])}"
    return shown(name, row[f"mean_{name}"]) + spread + (" *" if best else "")


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
    if measure_of(comparison.dense) != "token_ppl":
        text = f"{data['windows']} inputs of {data['source']}"
    marks = "± is the standard deviation over calibration seeds, * the best of a column."
    return f"{model}: {comparison.identity['protocol']}, {text}; {marks}"


def markdown(comparison: Comparison) -> str:
    """The table of scores, and the differences between methods where there are several seeds, as Markdown."""
    header, rows = score_table(comparison)
    lines = [f"# Comparison of {comparison.identity['model']['name']}", "", caption(comparison), ""]
    lines += _markdown([header, ["---", *["---:"] * (len(header) - 1)], *rows])
    if found := comparison.to_json()["differences"]:
        unit = UNITS[measure_of(comparison.cells[0])]
        losses = f"by {measured(unit)}" if unit == "input" else f"in nats {each(unit)}"
        lines += ["", "## Differences and the spread over seeds", "", f"Losses {losses}.", ""]
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
    more = [name for name in SCORES if any(name in row for row in comparison.cells)]
    columns = [*Cell._fields, "token_ppl", "nll", *more, "achieved"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison.cells)
    return out.getvalue()


def pictures(comparison: Comparison) -> dict[str, str]:
    """File stem -> SVG: the score by sparsity, and for each pattern and sparsity the sparsity (unless it is the same
    everywhere) and the output error by block."""
    found = {}
    if (by_sparsity := _score_by_sparsity(comparison)) is not None:
        measure = measure_of(comparison.cells[0])
        found["perplexity" if measure == "token_ppl" else measure] = by_sparsity
    depth = Axis(BLOCK, whole=True)
    picture = partial(chart, summary=_LOOKS, standalone=True)
    for name, cells in _first_seeds(comparison).items():
        stem = name.replace(" %", "").replace(":", "of")
        plans = {row["allocator"]: row for row in cells if row["criterion"] == cells[0]["criterion"]}
        lines = [_looking(comparison, row, Series(a, *_by_block(row["sparsity_by_block"]))) for a, row in plans.items()]
        if any(max(s.values()) - min(s.values()) > EQUAL for s in (row["sparsity_by_block"] for row in cells)):
            found[f"sparsity-{stem}"] = picture(f"Sparsity by block at {name}", lines, depth, SPARSITY)
        errors = [(row, row["error_by_block"]) for row in cells]
        lines = [_looking(comparison, row, Series(method(row), range(len(e)), e)) for row, e in errors]
        found[f"error-{stem}"] = picture(f"Error of each block's output at {name}", lines, depth, ERROR)
    return found


def _by_block(sparsity: Mapping[str, float]) -> tuple[list[int], list[float]]:
    """Block numbers, and sparsities in %."""
    return [int(block) for block in sparsity], [100 * value for value in sparsity.values()]


def _looking(comparison: Comparison, row: Mapping[str, Any], series: Series) -> Series:
    """The series in the colour of the row's allocator and with the kind of line of its criterion."""
    allocators, criteria = (list(dict.fromkeys(cell[key] for cell in comparison.cells)) for key in Cell._fields[2:4])
    colour, dash = allocators.index(row["allocator"]), criteria.index(row["criterion"])
    return replace(series, colour=colour, dash=dash)


def _score_by_sparsity(comparison: Comparison) -> str | None:
    """One line per method; None where there is a single sparsity."""
    rows = [row for row in summary(comparison.cells) if row["pattern"] == "unstructured"]
    sparsities = sorted({100 * row["sparsity"] for row in rows})
    if len(sparsities) < 2:
        return None
    lines = [
        _line(comparison, [row for row in rows if method(row) == name]) for name in dict.fromkeys(map(method, rows))
    ]
    measure = measure_of(rows[0])
    dense = comparison.dense.get(measure)
    lines.append(Series("dense", sparsities, [dense] * len(sparsities), marks=False, colour=-1))
    better = "lower" if measure in ("token_ppl", "kl") else "higher"
    words = TITLES[measure].removesuffix(", %")
    title = f"{words[0].upper()}{words[1:]} of {comparison.identity['model']['name']} by sparsity ({better} is better)"
    x, y = Axis("sparsity (%)"), Axis(words, log=measure == "token_ppl")
    return chart(title, lines, x, y, summary=_LOOKS, standalone=True)


def _line(comparison: Comparison, rows: Sequence[dict[str, Any]]) -> Series:
    name = measure_of(rows[0])
    x, y, spread = ([row[key] for row in rows] for key in ("sparsity", f"mean_{name}", f"spread_{name}"))
    x = [100 * sparsity for sparsity in x]
    series = Series(method(rows[0]), x, y)
    if None not in spread:
        low, high = ([v + sign * s for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
        series = replace(series, low=low, high=high)
    return _looking(comparison, rows[0], series)


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
