"""Datasets of the Hugging Face hub, and local files and directories in a form that `datasets` reads.

The papers' corpora by their current names: C4 by its data files (`allenai/c4`; the configuration of 2023 no longer
exists), WikiText-2 as `Salesforce/wikitext`, `wikitext-2-raw-v1`, the Penn Treebank in the hub's own conversion (its
loading script is no longer supported). `datasets` is imported only here, when it is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from billhook.errors import BillhookError, first_line
from billhook.text.no_rows import has_no_rows
from billhook.text.rows import Chat, fields_of, no_text, row_document, warn_of_nulls

C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}
PTB_FILES = {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")}
_CONVERTED = "refs/convert/parquet"  # the branch of the hub's own conversion of a dataset
_FILES = {
    "c4": ("allenai/c4", C4_FILES, None, "text"),
    "ptb": ("ptb-text-only/ptb_text_only", PTB_FILES, _CONVERTED, "sentence"),
}


@dataclass(frozen=True)
class DatasetSpec:
    """Arguments of `datasets.load_dataset`, and the field of the text."""

    name: str
    config: str | None
    split: str
    files: dict[str, str] | None = None
    revision: str | None = None
    field: str = "text"


def parse(source: str, purpose: str) -> DatasetSpec:
    """Parse `hub:NAME[:config][:split]`; the default split is train for calibration, else test (C4: validation)."""
    name, *rest = source.removeprefix("hub:").split(":")
    alias = name in ("wikitext2", *_FILES)
    if not name or len(rest) > (1 if alias else 2):
        form = f"hub:{name}[:split]" if alias else "hub:NAME[:config][:split]"
        raise BillhookError(f"Cannot read the source {source!r}: the form is {form}.")
    given = rest[-1] if len(rest) == (1 if alias else 2) else ""
    split = given or ("train" if purpose == "calibration" else "validation" if name == "c4" else "test")
    if name == "wikitext2":
        return DatasetSpec("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    if name in _FILES:
        dataset, files, revision, field = _FILES[name]
        if split not in files:
            known = " or ".join(f"hub:{name}:{each}" for each in files)
            raise BillhookError(f"{name.upper()} has no split {split!r}: use {known}.")
        return DatasetSpec(dataset, None, split, {split: files[split]}, revision, field)
    return DatasetSpec(name, (rest[0] if rest else "") or None, split)


class _Column(Sequence[str]):
    """The documents in some rows of a dataset on disk, read one at a time."""

    def __init__(self, dataset: Any, rows: Sequence[int], read: Callable[[Any, int], str]) -> None:
        self._dataset, self._rows, self._read = dataset, rows, read

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        row = self._rows[index]
        return self._read(self._dataset[row], row + 1)


def hub_documents(source: str, purpose: str, stream: bool, chat: Chat | None = None) -> Iterable[str]:
    """The documents of a hub dataset: with `stream` an iterable that downloads while it is read, else a sequence.

    Raises BillhookError if `datasets` is not installed, the dataset cannot be loaded, or it has neither a field `text`
    nor `messages`, which `chat` writes as text.
    """
    return _documents(parse(source, purpose), source, stream, chat)


def dataset_documents(path: Path, kind: str, purpose: str, stream: bool, chat: Chat | None = None) -> Iterable[str]:
    """The documents of a file of rows (`kind` is its suffix), or of a folder that `save_to_disk` wrote; as above."""
    if is_saved_dataset(path):
        split = "train" if purpose == "calibration" else "test"
        return _documents(DatasetSpec(str(path), None, split), str(path), stream, chat)
    if not path.is_file():
        raise BillhookError(f"There is no file {path}.")
    return _documents(DatasetSpec(kind.removeprefix("."), None, "train", {"train": str(path)}), str(path), stream, chat)


def is_saved_dataset(path: Path) -> bool:
    """Whether a directory was written by `save_to_disk` of `datasets`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def hub_rows(source: str, purpose: str) -> Any:
    """All rows of a hub dataset, such as of images; raises BillhookError where it cannot be loaded."""
    return _loaded(parse(source, purpose), source, False)[0]


def _documents(dataset: DatasetSpec, source: str, stream: bool, chat: Chat | None) -> Iterable[str]:
    loaded, columns = _loaded(dataset, source, stream)
    fields = fields_of(columns, dataset.field)
    if not fields:
        both = f"`{dataset.field}` or `messages`"
        raise BillhookError(f"{source} has no field {both}; it has {', '.join(columns) or 'nothing'}.")
    return (column if hasattr(loaded, "__len__") else _streamed)(loaded, fields, source, chat)


def _loaded(dataset: DatasetSpec, source: str, stream: bool) -> tuple[Any, list[str]]:
    """The dataset and the names of its columns."""
    try:
        import datasets
    except ImportError:
        need = f"The source {source} needs the package `datasets`"
        raise BillhookError(f"{need}: pip install 'billhook[data]', or give a .txt or .jsonl file.") from None
    place = Path(*(dataset.files or {"": dataset.name}).values()).expanduser()
    if has_no_rows(place, f".{dataset.name}", dataset.split):
        raise no_text(source)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = _load(datasets, dataset, stream)
        return loaded, loaded.column_names or list(next(iter(loaded), {}))
    except Exception as error:  # `datasets` and its dependencies raise a dozen unrelated kinds
        raise _failed(f"{source} (split {dataset.split})", error) from None
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _load(datasets: Any, dataset: DatasetSpec, stream: bool) -> Any:
    if is_saved_dataset(Path(dataset.name).expanduser()):
        loaded = datasets.load_from_disk(Path(dataset.name).expanduser())
        if isinstance(loaded, Mapping) and dataset.split not in loaded:
            raise ValueError(f"it has {', '.join(loaded)}: name one, hub:{dataset.name}::{next(iter(loaded))}")
        return loaded[dataset.split] if isinstance(loaded, Mapping) else loaded
    return datasets.load_dataset(
        dataset.name, dataset.config, split=dataset.split, data_files=dataset.files, revision=dataset.revision,
        streaming=stream,
    )  # fmt: skip


def _failed(source: str, error: Exception) -> BillhookError:
    return BillhookError(f"Cannot load {source}: {first_line(error, 300)}")


def _streamed(loaded: Iterable[dict[str, Any]], fields: Sequence[str], source: str, chat: Chat | None) -> Iterator[str]:
    """The documents of a streamed dataset; null is skipped, and the skipped rows are counted at the end."""
    nulls, found = 0, False
    try:
        for number, row in enumerate(loaded, start=1):
            text = row_document(row, fields, f"{source}, row {number}", chat)
            if text is None:
                nulls += 1
            else:
                found = found or bool(text.strip())
                yield text
    except BillhookError:
        raise
    except Exception as error:
        raise _failed(source, error) from None
    finally:
        warn_of_nulls(nulls, source)
    if not found:
        raise no_text(source)


def column(loaded: Any, fields: Sequence[str], source: str, chat: Chat | None = None) -> Sequence[str]:
    """The documents of a dataset on disk, without the rows in which all `fields` are null; `chat` writes `messages` as
    text. Raises BillhookError where no row is left."""
    rows: Sequence[int] = range(len(loaded))
    if all(loaded.data.column(field).null_count for field in fields):
        columns = zip(*(loaded[field] for field in fields), strict=True)
        rows = [number for number, values in enumerate(columns) if any(value is not None for value in values)]
        warn_of_nulls(len(loaded) - len(rows), source)
    if not rows:
        raise no_text(source)

    def read(row: Any, number: int) -> str:
        return row_document(row, fields, f"{source}, row {number}", chat) or ""

    found = _Column(loaded, rows, read)
    found[0]  # all rows of a column are of one type, so that one of another kind is found at once
    return found
