"""Token perplexity over non-overlapping windows: the protocol of the pruning papers (Wanda, SparseGPT, AlphaPruning,
ATP).

Each window of L tokens gives the mean negative log-likelihood (NLL) of its L - 1 targets; the perplexity is the
exponential of the mean over windows. Every window starts without context, and its first token is never scored. Numbers
depend on the window length and on the tokenizer: compare only equal lengths and vocabularies, or use bits per byte
across tokenizers. This is not lm-eval's word perplexity.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import PreTrainedModel

from billhook.engine.walk import evaluating
from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import batch_size as found_size
from billhook.evaluation.batching import halving
from billhook.evaluation.kl import Against, window_kl
from billhook.text.windows import Windows, check_ids, digest, whole_ids

PROTOCOL = "token perplexity over non-overlapping windows"
_LOSS_BYTES = 1 << 26  # of float32 logits that the loss works on at once


@dataclass(frozen=True)
class Evaluation:
    """`nll` in nats per token; `tokens` counts the scored ones; `bits_per_byte` is None where the text is not known.

    `against` says how far the model is from the dense one, where that was given.
    """

    token_ppl: float
    nll: float
    tokens: int
    windows: int
    length: int
    bits_per_byte: float | None
    source: str
    digest: str
    against: Against | None = None

    def to_dict(self) -> dict[str, Any]:
        """The protocol and all fields by name, for json; a perplexity too large to be a number is None."""
        return {
            "protocol": PROTOCOL,
            **asdict(self),
            "token_ppl": self.token_ppl if math.isfinite(self.token_ppl) else None,
        }


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
        raise BillhookError(
            f"Windows of {length} tokens exceed the model's context of {longest}: use --length {longest} or less."
        )


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    windows: Windows | Tensor,
    *,
    against: PreTrainedModel | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score `windows.ids` int64 [windows, length] (or such a tensor) with `model`, in the model's own dtype and a
    float32 loss.

    `against` is the dense model to compare predictions with; `batch_size` None finds one by itself
    (`billhook.evaluation.batching`); `progress(done, all)` is called after each batch. Raises BillhookError for windows
    longer than the context, ids outside the vocabulary or a dense model of another vocabulary, JobError for a NaN or
    infinite loss.
    """
    if isinstance(windows, Tensor):
        ids = whole_ids(windows, "windows")
        windows = Windows(ids, "given as a tensor", digest(ids), ids.numel(), None)
    models = [model] if against is None else [model, against]
    _check(models, windows)
    ids = windows.ids
    count, length = ids.shape
    sums = torch.zeros(2, count, dtype=torch.float64)
    kl: list[float] = []
    agreed = 0

    def score(start: int, stop: int) -> tuple[list[Tensor], list[float], int]:
        logits = [_logits(each, ids[start:stop]) for each in models]
        nll = [window_nll(found, ids[start:stop].to(found.device)).cpu() for found in logits]
        if against is None:
            return nll, [], 0
        found = [window_kl(q[:-1], p[:-1].to(q.device)) for q, p in zip(*logits, strict=True)]
        return nll, [each for each, _ in found], sum(same for _, same in found)

    size = batch_size or found_size(length, sum(map(vocabulary_size, models)), model.dtype.itemsize)
    with ExitStack() as modes:
        for each in models:
            modes.enter_context(evaluating(each))
        for start, stop, (nll, parted, same) in halving(count, size, score):
            sums[: len(models), start:stop] = torch.stack(nll)
            kl, agreed = kl + parted, agreed + same
            if progress is not None:
                progress(stop, count)
    found = _summary(sums[0], windows)
    if against is None:
        return found
    name = Path(against.name_or_path or "").name or type(against).__name__
    return replace(found, against=Against.of(name, kl, agreed, found.tokens, _summary(sums[1], windows).nll))


def _check(models: Sequence[PreTrainedModel], windows: Windows) -> None:
    """Raise BillhookError unless every model can score these windows, with one vocabulary."""
    sizes = [vocabulary_size(model) for model in models]
    if len(set(sizes)) > 1:
        raise BillhookError(
            f"The models have {sizes[0]} and {sizes[1]} token ids: only models of one vocabulary can be compared."
        )
    for model, size in zip(models, sizes, strict=True):
        check_length(model.config, windows.ids.shape[1])
        check_ids(windows.ids, size, windows.source)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits


def window_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed negative log-likelihood of each window: logits [windows, L, vocabulary], ids [windows, L] -> float64
    [windows]."""
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
        raise JobError(
            f"The model's loss on window {bad} of {windows.source} is not a finite number: its weights are damaged."
        )
    nll = total / tokens
    bits = total / math.log(2) / windows.text_bytes if windows.text_bytes else None
    # A model that knows nothing can have an NLL whose exponential overflows; infinity is then the truth.
    ppl = math.exp(nll) if nll < 709 else math.inf
    return Evaluation(ppl, nll, tokens, count, length, bits, windows.source, windows.digest)
