"""The scored predictions of a model for a batch of any task."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.config import call_options, positions, predictions, vocabulary_size
from billhook.engine.batch import Batch, main_input, model_inputs
from billhook.evaluation.batching import TOKENS, batch_size
from billhook.evaluation.perplexity import window_nll
from billhook.evaluation.scoring import Scoring, scored_rows
from billhook.images.labels import UNKNOWN


def predicted(model: PreTrainedModel, batch: Batch, scoring: Scoring) -> list[tuple[Tensor, Tensor]]:
    """The scored outputs [n, classes] and labels [n] of each row of a batch."""
    output = model(**model_inputs(model, batch), **call_options(model))
    return scored_rows(*scoring.scored(predictions(model, output), batch))


def rows_at_once(model: PreTrainedModel, batch: Batch) -> int:
    """How many rows of a batch are scored at once: about 2048 tokens or positions of images."""
    inputs = main_input(model, batch)
    if model.main_input_name == "input_ids":
        return batch_size(inputs.shape[1], vocabulary_size(model), model.dtype.itemsize)
    return max(1, TOKENS // positions(model.config, tuple(inputs.shape)))


def row_nll(logits: Tensor, labels: Tensor) -> float:
    """The mean negative log-likelihood of the labels of one row, in nats; NaN where they are not known."""
    if bool((labels == UNKNOWN).any()):
        return math.nan
    return float(window_nll(logits[None], labels[None])) / len(labels)


@torch.no_grad()
def row_losses(model: PreTrainedModel, batches: Sequence[Batch], scoring: Scoring) -> list[float]:
    """The mean negative log-likelihood of each row, NaN where labels are not known."""
    return [row_nll(*pair) for batch in batches for pair in predicted(model, batch, scoring)]


def mean_loss(model: PreTrainedModel, batches: Sequence[Batch], scoring: Scoring) -> float:
    """The mean over rows of their negative log-likelihood, NaN where labels are not known."""
    values = row_losses(model, batches, scoring)
    return math.fsum(values) / len(values)
