"""The measured table: one row of values per prunable layer. Allocators read nothing else, so they need no model and no
torch.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.metrics import CURVES, FACTS
from billhook.registry import hint
from billhook.store.files import read_json, write_json

VERSION = 1
_MAKE = "Make one with billhook measure."
_NUMBERED = re.compile(r"(.*?)\.\d+\.")  # the name of a layer up to the number of its block or stage
_LARGEST = 1 << 31  # of a layer's dimensions: products of two are still exact as floats


@dataclass(frozen=True)
class Row:
    """One prunable layer: an entry of `rows` in table.json.

    * `layer`: full name; no name twice.
    * `block`: number of its block, from 0.
    * `kind`: name inside the block, without an expert's number, so that layers of one kind can be compared over depth.
    * `shape` (two integers): [out, in].
    * `metrics.*` (number): measured values by column; a parameter follows a colon, as in `outlier_ratio:5`. All are
      finite.
    * `curves.*` (list of numbers, optional): non-decreasing numbers by name: quantiles of scores or eigenvalues at
      equal steps, or the error curve at 0, 1/40, ..., 1.
    """

    layer: str
    block: int
    kind: str
    shape: tuple[int, int]
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Table:
    """Rows in model order. `model` and `made_by` may be empty. The fields are those of table.json.

    * `version` (integer): 1.
    * `rows`: the layers (see `Row`).
    * `model.name` (string): name of the model's directory, or of its class if it was measured in memory.
    * `model.type` (string): `model_type` of config.json.
    * `model.digest` (string or null): SHA-256 over configuration and weights; null for a model in memory.
    * `made_by.metrics` (list of strings): the columns that were asked for.
    * `made_by.calibration.*` (any, optional): the text, if a metric reads it: `source`, `digest` (SHA-256 of the
      windows), `sampling` (`packed`, `papers`, `as given` for a token file, `given` for a tensor), `samples`, `length`
      and `batch_size`.
    """

    rows: tuple[Row, ...]
    model: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(row.n for row in self.rows)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (out, in)."""
        return {row.layer: row.shape for row in self.rows}

    def blocks(self) -> dict[int, list[Row]]:
        """Block number -> its rows, in depth order."""
        grouped: dict[int, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.block):
            grouped.setdefault(row.block, []).append(row)
        return grouped

    def stacks(self) -> list["Table"]:
        """A table for each stack of blocks: the layers whose names are the same up to the first number."""
        found: dict[str, list[Row]] = {}
        for row in self:
            numbered = _NUMBERED.match(row.layer)
            found.setdefault(numbered[1] if numbered else "", []).append(row)
        return [replace(self, rows=tuple(rows)) for rows in found.values()]

    def columns(self) -> list[str]:
        """Names of the metrics that every row has."""
        names = list(self.rows[0].metrics) if self.rows else []
        return [name for name in names if all(name in row.metrics for row in self.rows)]

    def column(self, name: str) -> list[float]:
        """The metric `name` of every row; raises BillhookError when it was not measured or is not finite."""
        if name not in self.columns():
            raise _missing(name, self.columns())
        for row in self.rows:
            _check_number(row.layer, name, row.metrics[name])
        return [row.metrics[name] for row in self.rows]

    def curve(self, name: str) -> list[tuple[float, ...]]:
        """The curve `name` of every row; raises BillhookError when it was not measured."""
        if not self.rows or not all(name in row.curves for row in self.rows):
            raise _missing(name, list(self.rows[0].curves) if self.rows else [])
        return [row.curves[name] for row in self.rows]

    def only(self, chosen: Collection[str], shapes: Mapping[str, tuple[int, int]]) -> "Table":
        """The rows of the layers `chosen` of a model with these `shapes`; raises BillhookError for another model."""
        for row in self.rows:
            if shapes.get(row.layer) != row.shape:
                found = "is {} x {}".format(*shapes[row.layer]) if row.layer in shapes else "is not"
                layer = f"{row.layer}, {row.shape[0]} x {row.shape[1]}, {found} in the model"
                raise BillhookError(f"The table is not of this model: {layer}. {_MAKE}")
        missing = [name for name in chosen if name not in self.shapes]
        if missing:
            raise BillhookError(f"The table is not of this model: it has no row for {missing[0]}. {_MAKE}")
        return Table(tuple(row for row in self.rows if row.layer in chosen), self.model, self.made_by)

    def save(self, path: str | Path) -> None:
        """Write table.json atomically."""
        rows = [
            {"layer": r.layer, "block": r.block, "kind": r.kind, "shape": list(r.shape), "metrics": r.metrics}
            | ({"curves": {name: list(curve) for name, curve in r.curves.items()}} if r.curves else {})
            for r in self.rows
        ]
        write_json(Path(path), {"version": VERSION, "model": self.model, "made_by": self.made_by, "rows": rows})

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read table.json; raises BillhookError naming the first invalid entry."""
        value = read_json(Path(path), "table")
        if value.get("version") != VERSION or not isinstance(value.get("rows"), list) or not value["rows"]:
            raise BillhookError(f"{path} is not a table of version {VERSION}: make one with billhook measure.")
        rows = tuple(_row(entry, f"{path}, row {number}") for number, entry in enumerate(value["rows"]))
        if len({row.layer for row in rows}) != len(rows):
            raise BillhookError(f"{path} names a layer twice.")
        for key in ("model", "made_by"):
            if not isinstance(value.get(key, {}), dict):
                raise BillhookError(f"{path}: {key!r} must be an object.")
        return cls(rows, value.get("model", {}), value.get("made_by", {}))


def _missing(column: str, there: list[str]) -> BillhookError:
    """The error for a column that is not among those that are there, with the command that measures it."""
    known = (FACTS | CURVES).get(column.partition(":")[0])
    text = " --calibration SOURCE" if known and known.needs_text else ""
    command = f"billhook measure MODEL --metrics {column}{text} -o table.json"
    found = f"The table has no column {column!r} (it has {', '.join(there) or 'none'}).{hint(column, there)}"
    return BillhookError(f"{found} Make it with: {command}")


def _row(entry: Any, where: str) -> Row:
    try:
        layer, block, kind, shape, metrics = (entry[key] for key in ("layer", "block", "kind", "shape", "metrics"))
        out, columns = shape
    except (KeyError, TypeError, ValueError) as error:
        raise BillhookError(f"{where}: needs layer, block, kind, shape [out, in] and metrics ({error!r}).") from None
    if not (isinstance(layer, str) and isinstance(kind, str) and isinstance(metrics, dict)):
        raise BillhookError(f"{where}: layer and kind must be strings, metrics an object.")
    if not all(type(x) is int and low <= x < _LARGEST for x, low in ((block, 0), (out, 1), (columns, 1))):
        found = f"got {block!r:.20} and {shape!r:.40}"
        raise BillhookError(f"{where} ({layer}): block and shape must be whole positive numbers, {found}.")
    row = Row(layer, block, kind, (out, columns), metrics, _curves(entry.get("curves", {}), f"{where} ({layer})"))
    for name, number in row.metrics.items():
        _check_number(f"{where} ({row.layer})", name, number)
    return row


def _curves(value: Any, where: str) -> dict[str, tuple[float, ...]]:
    """The curves of a row; raises BillhookError unless each is a non-decreasing list of two or more finite numbers."""
    if not isinstance(value, dict) or not all(isinstance(curve, list) and len(curve) > 1 for curve in value.values()):
        raise BillhookError(f"{where}: curves must be an object of lists of at least two numbers.")
    for name, curve in value.items():
        for number in curve:
            _check_number(where, name, number)
        if any(low > high for low, high in pairwise(curve)):
            raise BillhookError(f"{where}: the numbers of curve {name} must not decrease.")
    return {name: tuple(map(float, curve)) for name, curve in value.items()}


def _check_number(where: str, name: str, number: Any) -> None:
    """Raise BillhookError for a metric that is not a finite number, or so large that a sum of two could overflow."""
    if not isinstance(number, int | float) or isinstance(number, bool) or not abs(number) < 1e300:
        raise BillhookError(f"{where}: metric {name} must be a finite number, got {number!r:.40}. Use another metric.")
