"""Datasets of the Hugging Face hub, or a local directory in one of the forms `datasets` reads.

The papers' corpora are spelled in today's form: C4 by its data files (`allenai/c4`; the configuration name of 2023 is gone),
WikiText-2 as `Salesforce/wikitext`, `wikitext-2-raw-v1`. `datasets` is imported only here, only when a source asks for it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from billhook.errors import BillhookError

C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"}


@dataclass(frozen=True)
class Request:
    """What to ask `datasets.load_dataset` for."""

    name: str
    config: str | None
    split: str
    files: dict[str, str] | None = None


def parse(source: str, purpose: str) -> Request:
    """Read `hub:NAME[:config][:split]`; a missing split is train for calibration, test (C4: validation) for evaluation."""
    name, *rest = source.removeprefix("hub:").split(":")
    alias = name in ("c4", "wikitext2")
    if not name or len(rest) > (1 if alias else 2):
        form = f"hub:{name}[:split]" if alias else "hub:NAME[:config][:split]"
        raise BillhookError(f"Cannot read the source {source!r}: the form is {form}.")
    given = rest[-1] if len(rest) == (1 if alias else 2) else ""
    split = given or ("train" if purpose == "calibration" else "validation" if name == "c4" else "test")
    if name == "wikitext2":
        return Request("Salesforce/wikitext", "wikitext-2-raw-v1", split)
    if name == "c4":
        if split not in C4_FILES:
            raise BillhookError(f"C4 has no split {split!r}: use hub:c4:{' or hub:c4:'.join(C4_FILES)}.")
        return Request("allenai/c4", None, split, {split: C4_FILES[split]})
    return Request(name, (rest[0] if rest else "") or None, split)


class _Column(Sequence[str]):
    """The field `text` of a dataset on disk, read document by document."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found: str | list[str] = self._dataset[index]["text"]
        return found


def hub_documents(source: str, purpose: str, stream: bool) -> Iterable[str]:
    """The documents of a hub dataset: with `stream` an iterable that downloads what is read, else a sequence on disk.

    Raises BillhookError when `datasets` is not installed, the dataset or split cannot be had, or there is no field `text`.
    """
    request = parse(source, purpose)
    try:
        import datasets
    except ImportError:
        raise BillhookError(f"The source {source} needs the package `datasets`: pip install 'billhook[data]', or give a file.") from None
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(request.name, request.config, split=request.split, data_files=request.files, streaming=stream)
        columns = loaded.column_names or list(next(iter(loaded), {}))
    except Exception as error:  # datasets raises a dozen unrelated kinds, some of them from its own dependencies
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise BillhookError(f"Cannot load {source} (split {request.split}): {line}") from None
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if "text" not in columns:
        raise BillhookError(f"{source} has no field `text`; it has {', '.join(columns) or 'nothing'}.")
    return _texts(loaded) if stream else _Column(loaded)


def _texts(loaded: Any) -> Iterator[str]:
    return (item["text"] for item in loaded)
