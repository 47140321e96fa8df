"""Token perplexity over non-overlapping windows: the protocol of the pruning papers (Wanda, SparseGPT, AlphaPruning, ATP).

Each window of L tokens gives the mean negative log-likelihood (NLL) of its L - 1 targets; the perplexity is the exponential of
the mean over windows. Every window starts without context, and its first token is never scored. Numbers depend on the window
length and on the tokenizer: compare only equal lengths and vocabularies, or use bits per byte across tokenizers. This is not
lm-eval's word perplexity.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import PreTrainedModel

from billhook.data import Windows, check_ids, digest, whole_ids
from billhook.errors import BillhookError, JobError
from billhook.walk import evaluating

_LOGIT_BYTES = 1 << 28  # how much memory the logits of one batch may take
_LOSS_BYTES = 1 << 26  # and how much the float32 copy that the loss works on


@dataclass(frozen=True)
class Evaluation:
    """`nll` in nats per token; `tokens` counts the scored ones; `bits_per_byte` is None where the text is not known."""

    token_ppl: float
    nll: float
    tokens: int
    windows: int
    length: int
    bits_per_byte: float | None
    source: str
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for json; a perplexity too large to be a number is None."""
        return {**asdict(self), "token_ppl": self.token_ppl if math.isfinite(self.token_ppl) else None}


def context_length(config: Any) -> int | None:
    """The longest window the model was built for, or None where its configuration names no limit."""
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
        raise BillhookError(f"Windows of {length} tokens exceed the model's context of {longest}: use --length {longest} or less.")


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, windows: Windows | Tensor, *, batch_size: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Score `windows.ids` int64 [windows, length] (or such a tensor) with `model`, in the model's own dtype and a float32 loss.

    `batch_size` None chooses as many windows as keep the logits under 256 MiB. `progress(done, all)` is called after each batch.
    Raises BillhookError for windows longer than the context or ids outside the vocabulary, JobError for a NaN or infinite loss.
    """
    if isinstance(windows, Tensor):
        ids = whole_ids(windows, "windows")
        windows = Windows(ids, "given as a tensor", digest(ids), ids.numel(), None)
    ids = windows.ids
    count, length = ids.shape
    check_length(model.config, length)
    vocabulary = vocabulary_size(model)
    check_ids(ids, vocabulary, windows.source)
    size = batch_size or max(1, _LOGIT_BYTES // (length * vocabulary * model.dtype.itemsize))
    sums = torch.zeros(count, dtype=torch.float64)
    with evaluating(model):
        for start in range(0, count, size):
            batch = ids[start : start + size].to(model.device)
            logits = model(input_ids=batch, use_cache=False).logits
            sums[start : start + size] = window_nll(logits, batch).cpu()
            if progress is not None:
                progress(min(start + size, count), count)
    return _summary(sums, windows)


def window_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed negative log-likelihood of each window: logits [windows, L, vocabulary], ids [windows, L] -> float64 [windows]."""
    targets = ids[:, 1:].reshape(-1)
    rows = max(1, _LOSS_BYTES // (4 * logits.shape[-1]))
    scored = logits[:, :-1].flatten(0, 1)
    losses = [
        functional.cross_entropy(scored[i : i + rows].float(), targets[i : i + rows], reduction="none")
        for i in range(0, len(targets), rows)
    ]
    return torch.cat(losses).double().view(ids.shape[0], -1).sum(1)


def _summary(sums: Tensor, windows: Windows) -> Evaluation:
    count, length = windows.ids.shape
    total = float(sums.sum())
    tokens = count * (length - 1)
    if not math.isfinite(total):
        bad = int((~torch.isfinite(sums)).nonzero()[0])
        raise JobError(f"The model's loss on window {bad} of {windows.source} is not a finite number: its weights are damaged.")
    nll = total / tokens
    bits = total / math.log(2) / windows.text_bytes if windows.text_bytes else None
    # A model that knows nothing can have an NLL whose exponential overflows; infinity is then the truth.
    ppl = math.exp(nll) if nll < 709 else math.inf
    return Evaluation(ppl, nll, tokens, count, length, bits, windows.source, windows.digest)
