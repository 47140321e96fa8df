"""Calibration data given from Python: token ids, texts, rows of a dataset, or any iterable of these.

Token ids are whole numbers in a tensor, a numpy array or nested lists [windows, length]. A row is a text, a mapping
with a field `text` or `messages`, token ids [length] or [windows, length], or a mapping with them as `input_ids`. Rows
of token ids are used as they are, and all of them; they must be equally long. Of texts, windows are drawn as from a
file; a text that is None is skipped.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.text.hub import column
from billhook.text.rows import MESSAGES, TEXT, Chat, fields_of, row_document, warn_of_nulls

# the name of a source, or data; tensors, arrays and nested lists are token ids
Given = str | Path | Tensor | np.ndarray | Iterable[str | Tensor | np.ndarray | Sequence[int] | Mapping[str, Any]]
_WHO = "calibration"
_FORMS = "give a source's name, token ids [windows, length] in a tensor, array or nested list, or an iterable of "
_FORMS += "texts, of token ids, or of rows with `text`, `messages` or `input_ids`"
_IDS = "input_ids"
_FIELDS = (TEXT, _IDS, MESSAGES)  # of a row, in this order
_NOTHING = object()


def given(data: Given, chat: Chat | None = None) -> str | Tensor | Iterable[str]:
    """The name of a source, token ids int64 [windows, length], or documents: an iterator for an iterator, else a
    sequence; `chat` writes `messages` as text.

    Raises BillhookError for data of another kind, naming the row.
    """
    if isinstance(data, str | Path):
        return str(data)
    if _is_array(data):
        return whole_ids(_numbers(data, _WHO, "tokens"), _WHO)
    data = _rows(data)
    if not isinstance(data, Iterable) or isinstance(data, bytes | Mapping):
        raise BillhookError(f"{_WHO}: found {type(data).__name__}; {_FORMS}.")
    names = getattr(data, "column_names", None) or ()
    if _field(names) not in (None, _IDS) and isinstance(data, Sized):
        return column(data, fields_of(names), _WHO, chat)  # a dataset on disk, which is not read as a whole
    rows = iter(data)
    first: Any = next(rows, _NOTHING)
    if first is _NOTHING:
        raise BillhookError(f"{_WHO} is empty: {_FORMS}.")
    rows = chain([first], rows)
    if holds_ids(first):
        return torch.cat(_token_rows(rows))
    documents = _documents(rows, chat)
    return documents if isinstance(data, Iterator) else list(documents)


def holds_ids(data: Any) -> bool:
    """Whether data, or a row of them, are token ids, which need no tokenizer: numbers in a tensor, an array or nested
    lists, or a mapping or a list that begins with such ids."""
    while isinstance(data, list | tuple) and data:
        data = data[0]
    if isinstance(data, Number):
        return data == data  # not NaN, which is a text that is missing, as pandas writes it
    return _is_array(data) or (isinstance(data, Mapping) and _field(data) == _IDS)


def whole_ids(tokens: Any, source: str) -> Tensor:
    """Token ids as int64 [samples, length]; raises BillhookError for another shape or type, or an empty tensor."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        found = str(list(tokens.shape)) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise BillhookError(f"{source}: `tokens` must be [samples, length] with length 2 or more, found {found}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise BillhookError(f"{source}: `tokens` must be whole numbers, found {tokens.dtype}.")
    whole = tokens.to(torch.int64)
    return whole.clone() if whole.is_inference() else whole  # which could not be used in a backward pass


def _is_array(data: Any) -> bool:
    """Whether data are numbers in a tensor, or in an array as numpy has it."""
    return isinstance(data, Tensor) or getattr(getattr(data, "dtype", None), "kind", "") in tuple("biufc")


def _rows(data: Any) -> Any:
    """The rows of a table of pandas, Polars or Arrow, by their column of text, token ids (with the mask of padding) or
    messages; other data as they are."""
    columns = getattr(data, "columns", None)
    if columns is None or isinstance(data, Mapping) or not hasattr(data, "__getitem__"):
        return data
    names = [str(name) for name in (getattr(data, "column_names", None) or columns)]
    field = _field(names)
    if field is None:
        known = ", ".join(names) or "nothing"
        raise BillhookError(f"{_WHO} has no column `text`, `messages` or `input_ids`; it has {known}.")
    ids = [name for name in (_IDS, "attention_mask") if name in names]
    wanted = ids if field == _IDS else fields_of(names)
    columns = [data[name].to_pylist() if hasattr(data[name], "to_pylist") else data[name] for name in wanted]
    return [dict(zip(wanted, values, strict=True)) for values in zip(*columns, strict=True)]


def _field(names: Collection[str]) -> str | None:
    """The field of a row that is used, of those that it has."""
    return next((name for name in _FIELDS if name in names), None)


def _numbers(values: Any, where: str, name: str) -> Tensor:
    try:
        return values if isinstance(values, Tensor) else torch.tensor(values)  # a copy: arrays can be read-only
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise BillhookError(f"{where}: `{name}` must be a list of whole numbers, an array or a tensor.") from None


def _documents(rows: Iterable[Any], chat: Chat | None) -> Iterator[str]:
    nulls = 0
    for number, row in enumerate(rows, start=1):
        where = f"{_WHO}, row {number}"
        row = row if isinstance(row, Mapping) else {TEXT: row}
        fields = fields_of(row)
        if not fields:
            known = ", ".join(map(str, row)) or "nothing"
            raise BillhookError(f"{where} has no field `text` or `messages`; it has {known}.")
        value = row.get(TEXT)
        if isinstance(value, list) or _is_array(value):
            found = f"{where}: found {type(value).__name__}, not a text"
            raise BillhookError(f"{found}; all rows are token ids or none, and a chat is {{`messages`: [...]}}.")
        text = row_document(row, fields, where, chat)
        if text is None:
            nulls += 1
        else:
            yield text
    warn_of_nulls(nulls, _WHO)


def _token_rows(rows: Iterable[Any]) -> list[Tensor]:
    """Token ids int64 [windows, length] of each row."""
    found: list[Tensor] = []
    for number, row in enumerate(rows, start=1):
        where = f"{_WHO}, row {number}"
        ids = row.get("input_ids") if isinstance(row, Mapping) else row
        mask = row.get("attention_mask") if isinstance(row, Mapping) else None
        if mask is not None and not _numbers(mask, where, "attention_mask").all():
            raise BillhookError(f"{where} is padded: give windows of one length, without padding.")
        name = "input_ids" if isinstance(row, Mapping) else "tokens"
        ids = _numbers(ids, where, name) if isinstance(ids, list | tuple) or hasattr(ids, "__array__") else ids
        ids = whole_ids(ids[None] if isinstance(ids, Tensor) and ids.ndim == 1 else ids, where)
        if found and ids.shape[1] != found[0].shape[1]:
            both = f"{ids.shape[1]} tokens, the first row {found[0].shape[1]}"
            raise BillhookError(f"{where} has {both}: give windows of one length.")
        found.append(ids)
    return found
