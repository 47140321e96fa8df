"""Batches: mappings of keyword arguments, so that a model is called as `model(**batch)`.

The first dimension of every tensor of a batch is its rows (windows, images). `labels`, where present, are the correct
predictions; they are read by losses and scores and not passed to the model otherwise.
"""

from collections.abc import Iterable, Mapping
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


def as_batches(model: PreTrainedModel, given: Tensor | Batch | Iterable[Tensor | Batch]) -> list[Batch]:
    """Check batches given by a caller; a bare tensor is the model's main input (token ids int64 [windows, length]).

    Raises BillhookError for token ids of a wrong shape or type, or outside the model's vocabulary.
    """
    several = [given] if isinstance(given, Tensor | Mapping) else list(given)
    return [_as_batch(model, one) for one in several]


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
    return len(next(iter(batch.values())))


def select_rows(batch: Batch, index: Tensor | slice) -> Batch:
    """The batch of some rows of a batch."""
    return {name: value[index] for name, value in batch.items()}


def split_rows(batch: Batch, size: int) -> list[Batch]:
    """Split a batch into batches of `size` rows (the last one may be smaller)."""
    return [select_rows(batch, slice(start, start + size)) for start in range(0, rows_of(batch), size)]


def join_rows(batches: Iterable[Batch]) -> Batch:
    """One batch with the rows of several batches that have the same keys."""
    several = list(batches)
    return {name: torch.cat([batch[name] for batch in several]) for name in several[0]}


def main_input(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's main input in a batch, [rows, length, ...]."""
    return batch[model.main_input_name]


def row_length(model: PreTrainedModel, batch: Batch) -> int:
    """The tokens of a row, or about as many as an image has positions in the first block."""
    inputs = main_input(model, batch)
    return inputs.shape[1] if inputs.ndim == 2 else positions(model.config, tuple(inputs.shape))


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The keyword arguments of the model: the batch without its labels, on the model's device and in its dtype."""
    given = {name: value for name, value in batch.items() if name != LABELS}
    kinds = {name: model.dtype if value.is_floating_point() else value.dtype for name, value in given.items()}
    return {name: value.to(model.device, kinds[name]) for name, value in given.items()}
