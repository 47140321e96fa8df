"""Datasets of the Hugging Face hub, or a local directory in a form that `datasets` reads.

The papers' corpora by their current names: C4 by its data files (`allenai/c4`; the configuration of 2023 no longer
exists), WikiText-2 as `Salesforce/wikitext`, `wikitext-2-raw-v1`, the Penn Treebank in the hub's own conversion (its
loading script is no longer supported). `datasets` is imported only here, when it is needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from billhook.errors import BillhookError
from billhook.text.rows import checked, warn_of_nulls

C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
PTB_FILES = {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")}
_CONVERTED = "refs/convert/parquet"  # the branch of the hub's own conversion of a dataset
_FILES = {
    "c4": ("allenai/c4", C4_FILES, None, "text"),
    "ptb": ("ptb-text-only/ptb_text_only", PTB_FILES, _CONVERTED, "sentence"),
}


@dataclass(frozen=True)
class Request:
    """Arguments of `datasets.load_dataset`, and the field of the text."""

    name: str
    config: str | None
    split: str
    files: dict[str, str] | None = None
    revision: str | None = None
    field: str = "text"


def parse(source: str, purpose: str) -> Request:
    """Parse `hub:NAME[:config][:split]`; the default split is train for calibration, else test (C4: validation)."""
    name, *rest = source.removeprefix("hub:").split(":")
    alias = name in ("wikitext2", *_FILES)
    if not name or len(rest) > (1 if alias else 2):
        form = f"hub:{name}[:split]" if alias else "hub:NAME[:config][:split]"
        raise BillhookError(f"Cannot read the source {source!r}: the form is {form}.")
    given = rest[-1] if len(rest) == (1 if alias else 2) else ""
    split = given or ("train" if purpose == "calibration" else "validation" if name == "c4" else "test")
    if name == "wikitext2":
        return Request("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    if name in _FILES:
        dataset, files, revision, field = _FILES[name]
        if split not in files:
            known = " or ".join(f"hub:{name}:{each}" for each in files)
            raise BillhookError(f"{name.upper()} has no split {split!r}: use {known}.")
        return Request(dataset, None, split, {split: files[split]}, revision, field)
    return Request(name, (rest[0] if rest else "") or None, split)


class _Column(Sequence[str]):
    """The texts of a dataset on disk, read one at a time."""

    def __init__(self, dataset: Any, field: str) -> None:
        self._dataset, self._field = dataset, field

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found: str | list[str] = self._dataset[index][self._field]
        return found


def hub_documents(source: str, purpose: str, stream: bool) -> Iterable[str]:
    """The documents of a hub dataset: with `stream` an iterable that downloads while it is read, else a sequence.

    Raises BillhookError if `datasets` is not installed, the dataset cannot be loaded, or it has no field `text`.
    """
    request = parse(source, purpose)
    try:
        import datasets
    except ImportError:
        need = f"The source {source} needs the package `datasets`"
        raise BillhookError(f"{need}: pip install 'billhook[data]', or give a file.") from None
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        where = {"split": request.split, "data_files": request.files, "revision": request.revision}
        loaded = datasets.load_dataset(request.name, request.config, streaming=stream, **where)
        columns = loaded.column_names or list(next(iter(loaded), {}))
    except Exception as error:  # `datasets` and its dependencies raise a dozen unrelated kinds
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise BillhookError(f"Cannot load {source} (split {request.split}): {line}") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if request.field not in columns:
        raise BillhookError(f"{source} has no field `{request.field}`; it has {', '.join(columns) or 'nothing'}.")
    return _streamed(loaded, request.field, source) if stream else _column(loaded, request.field, source)


def _streamed(loaded: Iterable[dict[str, Any]], field: str, source: str) -> Iterator[str]:
    """The documents of a streamed dataset; null is skipped, and the skipped rows are counted at the end."""
    nulls = 0
    try:
        for number, row in enumerate(loaded, start=1):
            if row[field] is None:
                nulls += 1
            else:
                yield checked(row[field], f"{source}, row {number}")
    finally:
        warn_of_nulls(nulls, source)


def _column(loaded: Any, field: str, source: str) -> "_Column":
    """The documents of a dataset on disk, without the rows whose text is null."""
    if nulls := loaded.data.column(field).null_count:
        warn_of_nulls(nulls, source)
        loaded = loaded.select([number for number, text in enumerate(loaded[field]) if text is not None])
    if len(loaded):
        checked(loaded[0][field], f"{source}, row 1")  # all rows of a column are of one type
    return _Column(loaded, field)
