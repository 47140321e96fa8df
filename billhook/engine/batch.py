"""Batches: mappings of keyword arguments, so that a model is called as `model(**batch)`.

The first dimension of every tensor of a batch is its rows (windows, images). `labels`, where present, are the correct
predictions; they are read by losses and scores and not passed to the model otherwise. Rows of different lengths, such
as questions about images, are `Ragged`: nothing is padded, so that no statistic counts padding. A batch of a single row
may have tensors whose first dimension is not its rows (the patches of all images, in Qwen's models).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import positions, vocabulary_size
from billhook.errors import BillhookError
from billhook.text.given import whole_ids
from billhook.text.windows import check_ids

Batch = Mapping[str, Tensor]
LABELS = "labels"
_TOKENS = "input_ids"


@dataclass(frozen=True)
class Ragged(Mapping[str, Tensor]):
    """Rows that do not fit into one tensor, each a batch of a single row.

    It is a mapping only to be described: reading a key gives the tensors of all rows in one, those [1, length] padded
    with zeros. A model is called with the batches of `split_rows`.
    """

    rows: tuple[Batch, ...]

    def __getitem__(self, key: str) -> Tensor:
        values = [row[key] for row in self.rows]
        if any(value.ndim != 2 or len(value) != 1 for value in values):
            return torch.cat(values)
        return torch.nn.utils.rnn.pad_sequence([value[0] for value in values], batch_first=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows[0])


def as_batches(model: PreTrainedModel, given: Tensor | Batch | Iterable[Tensor | Batch]) -> list[Batch]:
    """Check batches given by a caller; a bare tensor is the model's main input (token ids int64 [windows, length]).

    Raises BillhookError for token ids of a wrong shape or type, or outside the model's vocabulary.
    """
    several = [given] if isinstance(given, Tensor | Mapping) else list(given)
    whole = [part for one in several for part in (split_rows(one, rows_of(one)) if isinstance(one, Ragged) else [one])]
    return [_as_batch(model, one) for one in whole]


def _as_batch(model: PreTrainedModel, one: Tensor | Batch) -> Batch:
    name = model.main_input_name
    given = {name: one} if isinstance(one, Tensor) else one
    batch = {key: value.clone() if value.is_inference() else value for key, value in given.items()}
    if name not in batch:
        found = ", ".join(batch) or "nothing"
        raise BillhookError(f"A batch for {type(model).__name__} needs {name!r}; it has {found}.")
    if name == "input_ids":
        batch[name] = whole_ids(batch[name], "batches")
        check_ids(batch[name], vocabulary_size(model), "batches")
    return batch


def rows_of(batch: Batch) -> int:
    """The number of rows of a batch."""
    if isinstance(batch, Ragged):
        return len(batch.rows)
    return len(batch[_TOKENS] if _TOKENS in batch else next(iter(batch.values())))


def select_rows(batch: Batch, index: Tensor | slice) -> Batch:
    """The batch of some rows of a batch."""
    if isinstance(batch, Ragged):
        return join_rows([batch.rows[n] for n in torch.arange(len(batch.rows))[index].tolist()])
    if rows_of(batch) == 1 and any(len(value) != 1 for value in batch.values()):
        return join_rows([batch] * len(torch.zeros(1)[index]))
    return {name: value[index] for name, value in batch.items()}


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into batches of `size` rows; smaller where the rows end or, of ragged ones, change their shape."""
    if not isinstance(batch, Ragged):
        return [select_rows(batch, slice(start, start + size)) for start in range(0, rows_of(batch), size)]
    parts: list[list[Batch]] = []
    for row in batch.rows:
        if not parts or len(parts[-1]) == size or not _fit(parts[-1][0], row):
            parts.append([])
        parts[-1].append(row)
    return [join_rows(part) for part in parts]


def join_rows(batches: Iterable[Batch]) -> Batch:
    """One batch with the rows of several batches that have the same keys; ragged where they differ in shape."""
    several = list(batches)
    if len(several) == 1:
        return several[0]
    if (
        several
        and not any(isinstance(batch, Ragged) for batch in several)
        and all(_fit(several[0], batch) for batch in several)
    ):
        return {name: torch.cat([batch[name] for batch in several]) for name in several[0]}
    rows = [row for batch in several for row in (batch.rows if isinstance(batch, Ragged) else split_rows(batch, 1))]
    return Ragged(tuple(rows))


def _fit(first: Batch, second: Batch) -> bool:
    """Whether the rows of two batches can be in one tensor."""
    whole = all(len(value) == rows_of(batch) for batch in (first, second) for value in batch.values())
    shapes = [{name: value.shape[1:] for name, value in batch.items()} for batch in (first, second)]
    return whole and shapes[0] == shapes[1]


def main_input(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's main input in a batch, [rows, length, ...]: token ids where there are any."""
    return batch[_TOKENS if _TOKENS in batch else model.main_input_name]


def row_length(model: PreTrainedModel, batch: Batch) -> int:
    """The tokens of a row, or about as many as an image has positions in the first block."""
    inputs = main_input(model, batch)
    return inputs.shape[1] if inputs.ndim == 2 else positions(model.config, tuple(inputs.shape))


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model: the batch without its labels, on the model's device and in its dtype."""
    given = {name: value for name, value in batch.items() if name != LABELS}
    kinds = {name: model.dtype if value.is_floating_point() else value.dtype for name, value in given.items()}
    return {name: value.to(model.device, kinds[name]) for name, value in given.items()}
