"""Token windows from a SOURCE, for tasks whose inputs are tokens."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.architectures.config import check_length, context_length, vocabulary_size
from billhook.store.checkpoint import load_tokenizer
from billhook.tasks.base import Drawing, Home
from billhook.text.windows import Tokens, check_ids, digest, load_calibration, whole_ids

LONGEST = 2048  # tokens in a window by default


def window_length(model: PreTrainedModel, length: int | None) -> int:
    """`length`, by default the model's context or 2048 if that is less; BillhookError beyond the context."""
    length = min(LONGEST, context_length(model.config) or LONGEST) if length is None else length
    check_length(model.config, length)
    return length


def tokenizer_of(model: PreTrainedModel, home: Home) -> Tokenizer | None:
    """The tokenizer of a model directory, or of that from which a model in memory was loaded."""
    directory = home.directory or (Path(model.name_or_path) if model.name_or_path else None)
    return None if directory is None else load_tokenizer(directory, trust_remote_code=home.trust_remote_code)


def given_windows(ids: Any, model: PreTrainedModel) -> Tokens:
    """Windows that the caller gave as a tensor, checked against the model's vocabulary and context."""
    ids = whole_ids(ids, "calibration")
    check_ids(ids, vocabulary_size(model), "calibration")
    check_length(model.config, ids.shape[1])
    return Tokens(ids, "given as a tensor", digest(ids), "given")


def drawn_windows(
    source: str,
    tokenizer: Tokenizer | None,
    model: PreTrainedModel,
    drawing: Drawing,
    *,
    reserved: int = 0,
    fewer: bool = False,
) -> Tokens:
    """Windows int64 [samples, length - reserved] from a SOURCE; `reserved` positions are left for special tokens.

    With `fewer`, a shorter text gives fewer windows.
    """
    return load_calibration(
        source,
        tokenizer,
        samples=drawing.samples,
        length=window_length(model, drawing.length) - reserved,
        seed=drawing.seed,
        sampling=drawing.sampling,
        vocab_size=vocabulary_size(model),
        fewer=fewer,
    )


def as_tensor(source: Any) -> Tensor | None:
    """A source that is not a name."""
    return None if isinstance(source, str | Path) else source
