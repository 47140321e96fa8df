"""A comparison to look at: a table for the terminal, Markdown and CSV, and pictures (`billhook.reports.charts`)."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.comparison.record import Comparison, method, place, summary
from billhook.reports.charts import Axis, Series, chart
from billhook.store.files import write_text

TABLE, MARKDOWN, CSV = "compare.txt", "compare.md", "compare.csv"


def header_and_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """A row for each method, a column for each pattern and sparsity; means over seeds with their standard deviation,
    best marked *."""
    found = summary(comparison.cells)
    places, methods = (list(dict.fromkeys(name(row) for row in found)) for name in (place, method))
    shown = {(method(row), place(row)): row for row in found}
    best = {p: min((row["mean_nll"] for row in found if place(row) == p), default=None) for p in places}
    rows = [["dense", *[_ppl(comparison.dense.get("token_ppl"))] * len(places)]]
    for name in methods:
        cells = [shown.get((name, p)) for p in places]
        rows.append([name, *(_cell(row, row is not None and row["mean_nll"] == best[place(row)]) for row in cells)])
    return ["token perplexity", *places], rows


def _cell(row: Mapping[str, Any] | None, best: bool) -> str:
    if row is None:
        return "-"
    spread = "" if row["spread_token_ppl"] is None else f" ± {row['spread_token_ppl']:.2f}"
    return _ppl(row["mean_token_ppl"]) + spread + (" *" if best else "")


def _ppl(value: float | None) -> str:
    return "beyond measure" if value is None else f"{value:.2f}"


def caption(comparison: Comparison) -> str:
    """What the numbers are, and of what."""
    data, model = comparison.identity["data"], comparison.identity["model"]["name"]
    return (
        f"{model}: {comparison.identity['protocol']}, {data['windows']} windows of {data['length']} tokens of "
        f"{data['source']}; "
        "± is the standard deviation over calibration seeds, * the best of a column."
    )


def markdown(comparison: Comparison) -> str:
    """The table, the differences that count and those that do not, as Markdown."""
    header, rows = header_and_rows(comparison)
    lines = [f"# Comparison of {comparison.identity['model']['name']}", "", caption(comparison), ""]
    lines += ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    found = comparison.to_json()["differences"]
    if found:
        lines += ["", "## Differences and the spread over seeds", "", "Losses in nats a token.", ""]
        lines += [
            "| at | better | worse | difference | spread | larger than the spread |",
            "| --- | --- | --- | ---: | ---: | --- |",
        ]
        for row in found:
            verdict = "yes" if row["larger_than_spread"] else "no"
            cells = [
                place(row),
                row["better"],
                row["worse"],
                f"{row['difference_nll']:.4f}",
                f"{row['spread_nll']:.4f}",
                verdict,
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spreadsheet(comparison: Comparison) -> str:
    """Every cell, a line each, as CSV."""
    out = io.StringIO()
    columns = ["pattern", "sparsity", "allocator", "criterion", "seed", "token_ppl", "nll", "achieved"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(comparison.cells)
    return out.getvalue()


def pictures(comparison: Comparison, standalone: bool = True) -> dict[str, str]:
    """File stem -> SVG: perplexity against sparsity, sparsity by depth for each target, error by block for each
    target."""
    found = {}
    rows = summary(comparison.cells)
    free = [row for row in rows if row["pattern"] == "unstructured"]
    title = f"Token perplexity of {comparison.identity['model']['name']} against sparsity"
    if len({row["sparsity"] for row in free}) > 1:
        lines = [
            _by_sparsity(name, [r for r in free if method(r) == name]) for name in dict.fromkeys(map(method, free))
        ]
        ends = [min(r["sparsity"] for r in free), max(r["sparsity"] for r in free)]
        dense = comparison.dense.get("token_ppl")
        lines.append(Series("dense", [100 * e for e in ends], [dense, dense], marks=False, dashed=True))
        axes = Axis("weights removed (%)"), Axis("token perplexity (lower is better)", log=True)
        found["perplexity"] = chart(
            title, lines, *axes, summary="One line for each method; the table has the numbers.", standalone=standalone
        )
    for target in dict.fromkeys(map(place, rows)):
        cells = [row for row in comparison.cells if place(row) == target]
        first = [row for row in cells if row["seed"] == cells[0]["seed"]]
        name = target.replace(" %", "").replace(":", "of")
        depth, blocks = (
            Axis("block, from the input (0)", whole=True),
            [list(map(int, row["sparsity_by_block"])) for row in first],
        )
        lines = [
            Series(row["allocator"], b, [100 * v for v in row["sparsity_by_block"].values()])
            for row, b in {r["allocator"]: (r, b) for r, b in zip(first, blocks, strict=True)}.values()
        ]
        found[f"sparsity-{name}"] = chart(
            f"What each block loses at {target}",
            lines,
            depth,
            Axis("weights removed (%)"),
            summary="By allocator.",
            standalone=standalone,
        )
        lines = [Series(method(row), range(len(row["error_by_block"])), row["error_by_block"]) for row in first]
        label = Axis("error of the block's output, share of its square", log=True)
        found[f"error-{name}"] = chart(
            f"How errors grow with depth at {target}",
            lines,
            depth,
            label,
            summary="By method; lower is better.",
            standalone=standalone,
        )
    return found


def _by_sparsity(name: str, rows: Sequence[Mapping[str, Any]]) -> Series:
    x, y = [100 * row["sparsity"] for row in rows], [row["mean_token_ppl"] for row in rows]
    if any(row["spread_token_ppl"] is None for row in rows):
        return Series(name, x, y)
    spread = [row["spread_token_ppl"] for row in rows]
    return Series(
        name,
        x,
        y,
        low=[v - s for v, s in zip(y, spread, strict=True)],
        high=[v + s for v, s in zip(y, spread, strict=True)],
    )


def write_views(comparison: Comparison) -> list[str]:
    """Write Markdown, CSV and pictures beside compare.json; returns the names of the files."""
    assert comparison.folder is not None
    texts = {MARKDOWN: markdown(comparison), CSV: spreadsheet(comparison)}
    texts |= {f"{stem}.svg": picture for stem, picture in pictures(comparison).items()}
    for name, text in texts.items():
        write_text(comparison.folder / name, text)
    return list(texts)
