"""How far a model's predictions are from those of the dense model it was made from: KL divergence and top-1 agreement.

Both models see the same windows. The divergence is KL(dense || model) of the next-token distributions over the whole
vocabulary, in nats a token; the agreement is the share of tokens for which both find the same next token likeliest.
Unlike perplexity neither says anything about the text, so a text that the model knows badly serves as well. Both models
are in memory at once.
"""

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW_BYTES = 1 << 26  # of float32 log-probabilities worked on at once


@dataclass(frozen=True)
class Against:
    """What a comparison with the dense model found; `kl` in nats a token, `kl_error` its standard error over
    windows."""

    model: str
    kl: float
    kl_error: float | None
    top1_agreement: float
    token_ppl: float | None
    nll: float

    @classmethod
    def of(cls, model: str, kl: list[float], agreed: int, tokens: int, nll: float) -> "Against":
        """`kl` is the mean of each window, `agreed` the number of `tokens` on which the likeliest next token is the
        same."""
        error = statistics.stdev(kl) / math.sqrt(len(kl)) if len(kl) > 1 else None
        return cls(model, statistics.fmean(kl), error, agreed / tokens, math.exp(nll) if nll < 709 else None, nll)


def divergence(logits: Tensor, dense: Tensor) -> tuple[float, int]:
    """The mean divergence of the predictions `logits` [tokens, vocabulary] from `dense`, and the number of equal top-1
    predictions."""
    agreed, total, rows = 0, 0.0, max(1, _ROW_BYTES // (4 * logits.shape[-1]))
    for q, p in zip(logits.split(rows), dense.split(rows), strict=True):
        agreed += int((q.argmax(-1) == p.argmax(-1)).sum())
        log_q, log_p = torch.log_softmax(q.float(), -1), torch.log_softmax(p.float(), -1)
        total += float((log_p.exp() * (log_p - log_q)).sum(-1).sum(dtype=torch.float64))
    return total / len(logits), agreed
