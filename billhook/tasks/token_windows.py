"""Token windows from a SOURCE, for tasks whose inputs are tokens."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.architectures.config import check_length, context_length, vocabulary_size
from billhook.store.checkpoint import load_tokenizer
from billhook.tasks.base import Drawing, Home
from billhook.text.given import Given
from billhook.text.windows import Tokens, load_calibration

LONGEST = 2048  # tokens in a window by default


def window_length(model: PreTrainedModel, length: int | None) -> int:
    """`length`, by default the model's context or 2048 if that is less; BillhookError beyond the context."""
    length = min(LONGEST, context_length(model.config) or LONGEST) if length is None else length
    check_length(model.config, length)
    return length


def tokenizer_of(model: PreTrainedModel, home: Home) -> Tokenizer | None:
    """The tokenizer of a model directory, or of that from which a model in memory was loaded."""
    directory = home.directory_of(model)
    return None if directory is None else load_tokenizer(directory, trust_remote_code=home.trust_remote_code)


def drawn_windows(
    source: Given,
    tokenizer: Tokenizer | None,
    model: PreTrainedModel,
    drawing: Drawing,
    *,
    reserved: int = 0,
    fewer: bool = False,
) -> Tokens:
    """Windows int64 [samples, length - reserved] from a SOURCE or given data; `reserved` positions are left for special
    tokens. Token ids that were given are used as they are.

    With `fewer`, a shorter text gives fewer windows.
    """
    found = load_calibration(
        source,
        tokenizer,
        samples=drawing.samples,
        length=window_length(model, drawing.length) - reserved,
        seed=drawing.seed,
        sampling=drawing.sampling,
        bos=drawing.bos,
        held_out=drawing.held_out,
        vocab_size=vocabulary_size(model),
        fewer=fewer or drawing.fewer,
    )
    check_length(model.config, found.ids.shape[1])
    return found


def framed(ids: Tensor, tokenizer: Tokenizer | None) -> Tensor:
    """Windows between [CLS] and [SEP], if the tokenizer has these tokens."""
    assert tokenizer is not None
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if first is None or last is None:
        return ids
    return torch.cat([torch.full((len(ids), 1), first), ids, torch.full((len(ids), 1), last)], 1)
