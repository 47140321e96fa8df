"""Token perplexity over non-overlapping windows: the protocol of Wanda, SparseGPT, AlphaPruning and ATP.

Each window of L tokens gives the mean negative log-likelihood (NLL) of its L - 1 targets; the perplexity is the
exponential of the mean over windows. Every window starts without context; its first token, a BOS token for models that
were trained with one (`billhook.text.windows`), is not scored. Perplexities
are comparable only for equal window lengths and tokenizers (bits per byte across tokenizers), and not with lm-eval's
word perplexity.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import PreTrainedModel

from billhook.ambient import evaluating, pinned
from billhook.architectures.config import call_options, check_length, vocabulary_size
from billhook.engine.batch import Batch, main_input, model_inputs, select_rows
from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import Progress, halving
from billhook.evaluation.batching import batch_size as found_size
from billhook.evaluation.kl import Against, WindowKl, window_kl
from billhook.evaluation.scoring import NEXT_TOKEN, Scoring, count_scored, scored_rows
from billhook.text.given import whole_ids
from billhook.text.windows import GIVEN, Windows, check_ids, digest

PROTOCOL = NEXT_TOKEN.protocol
_LOSS_BYTES = 1 << 26  # float32 logits whose loss is computed at once


@dataclass(frozen=True)
class Evaluation:
    """The token perplexity of a model on windows of text.

    * `token_ppl` (number or null): exp of `nll`; null in JSON if it is too large to be a number.
    * `nll`: mean negative log-likelihood of the scored tokens, in nats.
    * `tokens`: scored tokens: by the usual protocol, all of every window but its first.
    * `windows`: non-overlapping windows.
    * `length`: tokens in a window.
    * `bits_per_byte`: bits per byte of text, comparable across tokenizers; null for token files.
    * `source`: the text, as it was named.
    * `digest`: SHA-256 of the windows.
    * `bos` (boolean or null): whether every window begins with the BOS token; null for tokens that were given.
    * `against`: the comparison with the dense model; null without one.
    * `protocol`: how tokens are scored.
    """

    token_ppl: float
    nll: float
    tokens: int
    windows: int
    length: int
    bits_per_byte: float | None
    source: str
    digest: str
    bos: bool | None = None
    against: Against | None = None
    protocol: str = PROTOCOL

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, for json; an infinite perplexity is None."""
        return {**asdict(self), "token_ppl": self.token_ppl if math.isfinite(self.token_ppl) else None}


@pinned
@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    windows: Windows | Tensor | Batch,
    *,
    scoring: Scoring = NEXT_TOKEN,
    against: PreTrainedModel | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score `windows.ids` int64 [windows, length] (or such a tensor, or a batch) in the model's dtype, float32 loss.

    `scoring` selects the predictions that are scored; `against` is the dense model to compare predictions with;
    `batch_size` is automatic by default (`billhook.evaluation.batching`). Raises BillhookError for windows longer than
    the context, ids outside the vocabulary or a dense model with another vocabulary, JobError for a loss that is not
    finite.
    """
    models = [model] if against is None else [model, against]
    windows, batch = _checked(models, windows, scoring)
    count, length = windows.ids.shape
    sums = torch.zeros(2, count, dtype=torch.float64)
    kl: list[WindowKl] = []
    tokens = 0

    def score(start: int, stop: int) -> tuple[list[Tensor], list[WindowKl], int]:
        return _score(models, scoring, select_rows(batch, slice(start, stop)))

    size = batch_size or found_size(length, sum(map(vocabulary_size, models)), model.dtype.itemsize)
    with ExitStack() as modes:
        for each in models:
            modes.enter_context(evaluating(each))
        for start, stop, (nll, parted, scored) in halving(count, size, score):
            sums[: len(models), start:stop] = torch.stack(nll)
            kl, tokens = kl + parted, tokens + scored
            if progress is not None:
                progress(f"{stop}/{count} windows")
    found = replace(_summary(sums[0], tokens, windows), protocol=scoring.protocol)
    if against is None:
        return found
    name = Path(against.name_or_path or "").name or type(against).__name__
    return replace(found, against=Against.of(name, kl, tokens, _summary(sums[1], tokens, windows).nll))


def _score(
    models: Sequence[PreTrainedModel], scoring: Scoring, batch: Batch
) -> tuple[list[Tensor], list[WindowKl], int]:
    """The NLL of each window by each model, the divergence of each window, and the number of scored predictions."""
    outputs = [model(**model_inputs(model, batch), **call_options(model)).logits for model in models]
    found = [scoring.scored(logits, batch) for logits in outputs]
    nll = [window_nll(logits, labels).cpu() for logits, labels in found]
    scored = count_scored(found[0][1])
    return nll, _divergence(found) if len(found) > 1 else [], scored


def _divergence(found: Sequence[tuple[Tensor, Tensor]]) -> list[WindowKl]:
    """The KL divergence of each window's scored predictions."""
    ours, theirs = (scored_rows(logits, labels) for logits, labels in found)
    return [window_kl(q, p.to(q.device)) for (q, _), (p, _) in zip(ours, theirs, strict=True)]


def _checked(
    models: Sequence[PreTrainedModel], given: Windows | Tensor | Batch, scoring: Scoring
) -> tuple[Windows, Batch]:
    """The windows and their batch; raises BillhookError unless every model can score them, with one vocabulary."""
    windows = given
    if not isinstance(windows, Windows):
        ids = whole_ids(main_input(models[0], given) if isinstance(given, Mapping) else given, "windows")
        windows = Windows(ids, GIVEN, digest(ids), ids.numel(), None)
    sizes = [vocabulary_size(model) for model in models]
    if len(set(sizes)) > 1:
        both = f"The models have {sizes[0]} and {sizes[1]} token ids"
        raise BillhookError(f"{both}: only models with the same vocabulary can be compared.")
    for model, size in zip(models, sizes, strict=True):
        check_length(model.config, windows.ids.shape[1])
        check_ids(windows.ids, size, windows.source)
    return windows, given if isinstance(given, Mapping) else scoring.batch(windows.ids)


def window_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed NLL of each window, float64 [windows], for logits [windows, n, classes] and labels [windows, n].

    Positions with the label -100 are not scored.
    """
    targets = labels.reshape(-1).to(logits.device)
    rows = max(1, _LOSS_BYTES // (4 * logits.shape[-1]))
    scored = logits.flatten(0, 1)
    losses = [
        functional.cross_entropy(scored[i : i + rows].float(), targets[i : i + rows], reduction="none")
        for i in range(0, len(targets), rows)
    ]
    return torch.cat(losses).double().view(labels.shape[0], -1).sum(1)


def _summary(sums: Tensor, tokens: int, windows: Windows) -> Evaluation:
    count, length = windows.ids.shape
    total = float(sums.sum())
    if not math.isfinite(total):
        bad = int((~torch.isfinite(sums)).nonzero()[0])
        where = f"window {bad} of {windows.source}"
        raise JobError(f"The model's loss on {where} is not a finite number: its weights are damaged.")
    nll = total / tokens
    bits = total / math.log(2) / windows.text_bytes if windows.text_bytes else None
    ppl = math.exp(nll) if nll < 709 else math.inf  # the exponential would overflow
    return Evaluation(
        token_ppl=ppl, nll=nll, tokens=tokens, windows=count, length=length, bits_per_byte=bits,
        source=windows.source, digest=windows.digest, bos=windows.bos,
    )  # fmt: skip
