"""compare.json: one model pruned in many ways, one row per cell of the grid, rewritten after every cell.

File format: docs/formats/files.md. The same inputs and seeds give the same bytes: there are no dates or durations.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import billhook
from billhook.errors import BillhookError
from billhook.store.files import read_json, write_json
from billhook.store.output import check_record_place
from billhook.store.typed_json import typed

VERSION = 1
RECORD = "compare.json"
_DATA = {"source": str, "digest": str, "windows": int, "length": int}
_IDENTITY = {"model": {"name": str}, "protocol": str, "data": _DATA, "versions": dict[str, str]}


SCORES = ("top1", "exact_match", "cosine", "kl")  # of images and other inputs, the first one that there is
TITLES = {"token_ppl": "token perplexity", "top1": "top-1 accuracy, %", "exact_match": "exact match, %"}
TITLES |= {"cosine": "cosine", "kl": "KL divergence, nats an image"}
UNITS = {"token_ppl": "token", "top1": "image", "exact_match": "answer", "cosine": "input", "kl": "image"}
RATES = ("top1", "exact_match")  # shown in per cent


def measure_of(row: Mapping[str, Any]) -> str:
    """The key of the score that is shown for a cell or a mean of cells (without its prefix)."""
    return next((name for name in SCORES if name in row or f"mean_{name}" in row), "token_ppl")


def shown(name: str, value: float | None, digits: int = 2) -> str:
    """A score as text; `digits` are those of a perplexity."""
    if value is None:
        return "infinite"
    return f"{100 * value:.2f}" if name in RATES else f"{value:.{digits if name == 'token_ppl' else 4}f}"


class Cell(NamedTuple):
    """One way to prune the model; `allocator` may be the name of a plan, `recipe` is empty for a pair without one."""

    pattern: str
    sparsity: float
    allocator: str
    criterion: str
    recipe: str
    seed: int


_CELL = {**Cell.__annotations__, "recipe": str | None, "nll": float, "token_ppl": float | None}
_CELL |= {"sparsity_by_block": dict[str, float], "error_by_block": list[float]}


@dataclass
class Comparison:
    """What the numbers depend on (`identity`), the evaluation of the dense model, and a row for each finished cell.

    It is stored in `folder`, or only in memory where that is None.
    """

    folder: Path | None
    identity: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, Any], overwrite: bool) -> "Comparison":
        """A new comparison in `folder`, or the one that is there unless `overwrite`.

        Raises BillhookError for a folder that cannot be used, and for a comparison that is damaged or whose identity
        differs, naming the first difference.
        """
        if folder is None:
            return cls(None, identity)
        check_record_place(folder, RECORD)
        if overwrite or not (folder / RECORD).exists():
            return cls(folder, identity)
        found = load_comparison(folder)
        for key, value in identity.items():
            if found.identity.get(key) != value:
                change = f"its {key} was {found.identity.get(key)!r:.60} and is now {value!r:.60}"
                raise BillhookError(
                    f"{folder / RECORD} is another comparison: {change}. Choose another --output, or --overwrite."
                )
        return found

    def has(self, cell: Cell) -> bool:
        """Whether a cell is finished."""
        return any(_cell(row) == cell for row in self.cells)

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of a finished cell, and write compare.json."""
        self.cells.append(row)
        self.write()

    def write(self) -> None:
        """Write compare.json."""
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / RECORD, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The content of compare.json."""
        head = {"version": VERSION, "billhook": billhook.__version__, "identity": self.identity, "dense": self.dense}
        return {**head, "summary": summary(self.cells), "differences": differences(self.cells), "cells": self.cells}


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{key: row.get(key, "") for key in Cell._fields})


def load_comparison(folder: Path) -> Comparison:
    """Read DIR/compare.json; raises BillhookError where it is missing, of another version or damaged."""
    value = read_json(folder / RECORD, "comparison")
    if value.get("version") != VERSION:
        raise BillhookError(
            f"{folder / RECORD} is not a comparison of version {VERSION}: make it again with billhook compare."
        )
    where = f"{folder / RECORD} is damaged (start again with --overwrite)"
    typed({"identity": _IDENTITY, "dense": dict[str, Any], "cells": list}, value, where)
    for number, row in enumerate(value["cells"]):
        typed(_CELL, row, f"{where}, cell {number}")
        if not all(block.isdecimal() for block in row["sparsity_by_block"]):
            raise BillhookError(f"{where}, cell {number}, sparsity_by_block: not every key is the number of a block.")
    cells = [{**row, "token_ppl": row.get("token_ppl")} for row in value["cells"]]
    return Comparison(folder, value["identity"], value["dense"], cells)


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean and standard deviation over the seeds, for each method, pattern and sparsity."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in cells:
        groups.setdefault(_cell(row)[:-1], []).append(row)
    found = []
    for key, rows in groups.items():
        entry = dict(zip(Cell._fields[:-1], key, strict=True)) | {"seeds": len(rows)}
        for name in ("nll", "token_ppl", *(name for name in SCORES if name in rows[0])):
            values = [row[name] for row in rows]
            measured = None not in values
            entry[f"mean_{name}"] = statistics.fmean(values) if measured else None
            entry[f"spread_{name}"] = statistics.stdev(values) if measured and len(values) > 1 else None
        found.append(entry)
    return found


def differences(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each pair of methods at the same pattern and sparsity, the difference of their mean losses and its spread.

    The spread is the larger of the two standard deviations over seeds. A difference within the spread is no reason to
    prefer either method. Empty where no method was run with several seeds.
    """
    rows = summary(cells)
    if not any(row["seeds"] > 1 for row in rows):
        return []
    found = []
    for a, b in combinations(rows, 2):
        budget = {"pattern": a["pattern"], "sparsity": a["sparsity"]}
        if not budget.items() <= b.items():
            continue
        difference, spread = a["mean_nll"] - b["mean_nll"], max(a["spread_nll"] or 0.0, b["spread_nll"] or 0.0)
        better, worse = (b, a) if difference > 0 else (a, b)
        larger = {
            "difference_nll": abs(difference),
            "spread_nll": spread,
            "larger_than_spread": abs(difference) > spread,
        }
        found.append({**budget, "better": method(better), "worse": method(worse), **larger})
    return found


def method(row: Mapping[str, Any]) -> str:
    """The name of a method in tables and pictures."""
    return str(row.get("recipe") or f"{row['criterion']} + {row['allocator']}")


def budget(row: dict[str, Any]) -> str:
    """A pattern and sparsity in tables and pictures."""
    return row["pattern"] if row["pattern"] != "unstructured" else f"{100 * row['sparsity']:g} %"
