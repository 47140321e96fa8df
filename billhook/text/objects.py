"""Rows with several fields from a SOURCE, such as questions with answers, without torch.

FILE.jsonl                      an object a line
hub:NAME[:config][:split]       a dataset of the Hugging Face hub or a local one
rows given from Python          mappings
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.text.corpus import lines, parsed
from billhook.text.hub import hub_rows
from billhook.text.rows import cleaned, warn_of_nulls


@dataclass(frozen=True)
class DataRow:
    """The fields of a row, `where` it was found, and the folder beside which files are that it names."""

    where: str
    fields: Mapping[str, Any]
    folder: Path = Path()

    def text(self, key: str) -> str:
        """A field that must be a text which is not empty."""
        value = self.fields.get(key)
        if not isinstance(value, str) or not value.strip():
            raise BillhookError(f"{self.where} needs a text in {key!r}, found {type(value).__name__}.")
        return cleaned(value)


def without_nulls(rows: list[DataRow], keys: tuple[str, ...], source: str) -> list[DataRow]:
    """The rows in which none of the fields `keys` is null; the others are counted and logged.

    A row that lacks a field is kept, so that it is refused by name. Raises BillhookError where no row is left.
    """
    kept = [row for row in rows if not any(key in row.fields and row.fields[key] is None for key in keys)]
    warn_of_nulls(len(rows) - len(kept), source)
    if not kept:
        raise BillhookError(f"{source} is empty: in every row {' or '.join(map(repr, keys))} is null.")
    return kept


def objects(source: Any, purpose: str, forms: str) -> list[DataRow]:
    """The rows of a SOURCE or of rows given from Python; `forms` says in messages what a source is.

    `purpose`, calibration or evaluation, decides the default split of a hub dataset. Raises BillhookError for a source
    of another kind, for one without rows, and, naming the line, for one that is no object.
    """
    if not isinstance(source, str | Path):
        if not isinstance(source, Iterable) or isinstance(source, bytes | Mapping):
            raise BillhookError(f"{purpose}: found {type(source).__name__}; give {forms}, or an iterable of rows.")
        found = [_row(row, f"{purpose}, row {number}") for number, row in enumerate(source, start=1)]
    elif str(source).startswith("hub:"):
        rows = enumerate(hub_rows(str(source), purpose), start=1)
        found = [_row(row, f"{source}, row {number}") for number, row in rows]
    else:
        found = _lines(Path(source).expanduser(), str(source), forms)
    if not found:
        raise BillhookError(f"{purpose if isinstance(source, list) else source} is empty: give {forms}.")
    return found


def _lines(path: Path, name: str, forms: str) -> list[DataRow]:
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        why = "there is no such file" if not path.exists() else "it is no .jsonl file"
        raise BillhookError(f"{name}: {why}, and the model reads rows with several fields. A source is {forms}.")
    return [_row(parsed(line, where), where, path.parent) for where, line in lines(path)]


def _row(row: Any, where: str, folder: Path = Path()) -> DataRow:
    if not isinstance(row, Mapping):
        raise BillhookError(f"{where}: found {type(row).__name__}, not an object with fields.")
    return DataRow(where, row, folder)
