"""compare.json: a grid of allocators, criteria, patterns and sparsities, a cell a row, rewritten whole after every
cell.

File format: docs/formats.md, `compare.json`. The same inputs and seeds give the same bytes, so there is no date and no
duration in it.
"""

import math
import os
import statistics
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import billhook
from billhook.errors import BillhookError
from billhook.store.files import read_json, write_json

VERSION = 1
RECORD = "compare.json"
_KEYS = ("pattern", "sparsity", "allocator", "criterion", "seed")


@dataclass
class Comparison:
    """What was asked (`identity`), the dense model's evaluation, and a row for each finished cell; `folder` None keeps
    no file."""

    folder: Path | None
    identity: dict[str, Any]
    dense: dict[str, Any] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, Any], overwrite: bool) -> "Comparison":
        """Begin in `folder`, made if need be, or go on with the comparison that is there.

        Raises BillhookError, unless `overwrite`, where the one there was made otherwise (saying what differs) or is
        damaged.
        """
        if folder is None:
            return cls(None, identity)
        check_folder(folder)
        if overwrite or not (folder / RECORD).exists():
            return cls(folder, identity)
        found = load_comparison(folder)
        for key, value in identity.items():
            if found.identity.get(key) != value:
                was = f"{key} was {found.identity.get(key)!r:.60} and is now {value!r:.60}"
                raise BillhookError(
                    f"{folder / RECORD} was made otherwise: {was}. Choose another --output, or --overwrite."
                )
        return found

    def has(self, cell: tuple[Any, ...]) -> bool:
        """Whether a cell (pattern, sparsity, allocator, criterion, seed) is finished."""
        return any(tuple(row[key] for key in _KEYS) == cell for row in self.cells)

    def add(self, row: dict[str, Any]) -> None:
        """Note a finished cell on disk."""
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


def load_comparison(folder: Path) -> Comparison:
    """Read DIR/compare.json; raises BillhookError for one that is missing, of another version or damaged."""
    value = read_json(folder / RECORD, "comparison")
    if value.get("version") != VERSION:
        raise BillhookError(
            f"{folder / RECORD} is not a comparison of version {VERSION}: make it again with billhook compare."
        )
    identity, dense, cells = value.get("identity"), value.get("dense"), value.get("cells")
    whole = isinstance(identity, dict) and isinstance(dense, dict) and isinstance(cells, list)
    if not whole or not all(
        isinstance(row, dict) and {*_KEYS, "nll", "token_ppl"} <= row.keys() for row in cells or []
    ):
        raise BillhookError(f"{folder / RECORD} is damaged: start again with --overwrite.")
    return Comparison(folder, identity or {}, dense or {}, cells or [])


def check_folder(folder: Path) -> None:
    """Raise BillhookError unless a comparison can be written to `folder`: new, empty, or holding one already."""
    if folder.exists() and not folder.is_dir():
        raise BillhookError(f"The output {folder} is a file: choose a directory.")
    home = folder.absolute().parent
    if not folder.exists() and not home.is_dir():
        raise BillhookError(f"Cannot make {folder}: the folder it would be in does not exist. Create it first.")
    if not os.access(folder if folder.exists() else home, os.W_OK):
        raise BillhookError(f"Cannot write to {folder}: the folder is not writable.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists():
        raise BillhookError(f"The output {folder} is not empty and holds no comparison: choose another.")


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each method at each pattern and sparsity the mean over seeds and, with several, the standard deviation."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in cells:
        groups.setdefault(tuple(row[key] for key in _KEYS[:-1]), []).append(row)
    found = []
    for key, rows in groups.items():
        nll = [row["nll"] for row in rows]
        mean = statistics.fmean(nll)
        spread = statistics.stdev(nll) if len(nll) > 1 else None
        ppl = [row["token_ppl"] for row in rows]
        measured = None not in ppl
        entry = dict(zip(_KEYS[:-1], key, strict=True)) | {"seeds": len(rows), "mean_nll": mean, "spread_nll": spread}
        entry["mean_token_ppl"] = statistics.fmean(ppl) if measured else None
        entry["spread_token_ppl"] = statistics.stdev(ppl) if measured and len(ppl) > 1 else None
        found.append(entry)
    return found


def differences(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of methods at one pattern and sparsity: the difference of their mean losses, and whether it is larger than
    the spread.

    The spread is the larger of the two standard deviations over seeds, so nothing is said about methods that ran once
    unless they do not depend on the seed. A difference within the spread is no reason to prefer either.
    """
    found = []
    several = summary(cells)
    if not any(row["seeds"] > 1 for row in several):
        return []
    for a, b in combinations(several, 2):
        if (a["pattern"], a["sparsity"]) != (b["pattern"], b["sparsity"]):
            continue
        difference, spread = a["mean_nll"] - b["mean_nll"], max(a["spread_nll"] or 0.0, b["spread_nll"] or 0.0)
        better, worse = (b, a) if difference > 0 else (a, b)
        entry = {"pattern": a["pattern"], "sparsity": a["sparsity"], "better": method(better), "worse": method(worse)}
        found.append(
            entry
            | {"difference_nll": abs(difference), "spread_nll": spread, "larger_than_spread": abs(difference) > spread}
        )
    return found


def method(row: dict[str, Any]) -> str:
    """How a method is called in tables and pictures."""
    return f"{row['criterion']} + {row['allocator']}"


def place(row: dict[str, Any]) -> str:
    """How a pattern and sparsity are called."""
    return row["pattern"] if row["pattern"] != "unstructured" else f"{100 * row['sparsity']:g} %"


def finite(value: float) -> float | None:
    """The value, or None where it is too large to be a number."""
    return value if math.isfinite(value) else None
