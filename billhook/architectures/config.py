"""What a model's configuration and embeddings say about the texts it takes: context length and vocabulary size."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.errors import BillhookError


def context_length(config: Any) -> int | None:
    """The longest window in tokens the model was built for, or None where its configuration names no limit."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids the model has embeddings for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def check_length(config: Any, length: int) -> None:
    """Raise BillhookError when windows of `length` tokens are longer than the model's context."""
    longest = context_length(config)
    if longest is not None and length > longest:
        raise BillhookError(
            f"Windows of {length} tokens exceed the model's context of {longest}: use --length {longest} or less."
        )
