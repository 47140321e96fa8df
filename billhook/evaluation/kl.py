"""KL divergence of a model's next-token distributions from those of its teacher, the dense model, and top-1 agreement.

    KL(p || q) = sum over tokens v of p(v) (ln p(v) - ln q(v)),   p of the teacher, q of the model

in nats a token. The teacher is given as logits over the whole vocabulary, or as a `TopKTeacher`: the K most likely
tokens of each distribution, with all others as one bucket. This needs K / vocabulary of the memory, is a lower bound of
the divergence (log-sum inequality), and is exact for vocabularies of up to K tokens. Unlike perplexity, neither number
depends on the next token of the text, so text that the model predicts badly is equally suitable.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

K = 256
PERCENTILES = 0.99, 0.999
_ROW_BYTES = 1 << 26  # float32 log-probabilities in memory at once


class TopKTeacher(NamedTuple):
    """The K largest log-probabilities, descending, float32 [tokens, K], and their tokens, int32 [tokens, K]."""

    log_p: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> "TopKTeacher":
        """The top K of the teacher's `logits` [tokens, vocabulary]."""
        k = min(K, logits.shape[-1])
        parts = [part.float().log_softmax(-1).topk(k) for part in logits.split(_rows(logits))]
        return cls(torch.cat([p.values for p in parts]), torch.cat([p.indices.int() for p in parts]))

    def split(self, rows: int) -> "list[TopKTeacher]":
        """Split into parts of `rows` tokens, as `Tensor.split` does."""
        return [TopKTeacher(*part) for part in zip(self.log_p.split(rows), self.tokens.split(rows), strict=True)]


Teacher = Tensor | TopKTeacher


@dataclass(frozen=True)
class Against:
    """A comparison with the dense model.

    * `model`: name of the dense model.
    * `kl`: KL divergence of the model's next-token distribution from the dense model's, mean over scored tokens, in
      nats.
    * `kl_error`: its standard error over windows; null for a single window.
    * `kl_99` (number or null, optional): the 99th percentile of the divergence over tokens, linearly interpolated.
    * `kl_999` (number or null, optional): the 99.9th.
    * `top1_agreement`: fraction of scored tokens for which both have the same top-1 prediction.
    * `token_ppl`: the dense model's token perplexity on the same windows; null if it is too large to be a number.
    * `nll`: its logarithm.
    """

    model: str
    kl: float
    kl_error: float | None
    top1_agreement: float
    token_ppl: float | None
    nll: float
    kl_99: float | None = None
    kl_999: float | None = None

    @classmethod
    def of(cls, model: str, found: "Sequence[WindowKl]", tokens: int, nll: float) -> "Against":
        """From the divergence of each window, `tokens` in all."""
        kl = [window.mean for window in found]
        ppl, agreed = math.exp(nll) if nll < 709 else None, sum(window.agreed for window in found)
        kl_99, kl_999 = percentiles(found)
        return cls(
            model, kl=statistics.fmean(kl), kl_error=standard_error(kl), top1_agreement=agreed / tokens,
            token_ppl=ppl, nll=nll, kl_99=kl_99, kl_999=kl_999,
        )  # fmt: skip


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of `values`; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def token_kl(logits: Tensor, teacher: Teacher) -> Tensor:
    """The divergence of each token, float32 or float64 [..., tokens], for `logits` [..., tokens, vocabulary]."""
    log_q = logits.float().log_softmax(-1)
    if isinstance(teacher, Tensor):
        log_p = teacher.detach().float().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    kept = log_q.gather(-1, teacher.tokens.long())
    kl = (teacher.log_p.exp() * (teacher.log_p - kept)).sum(-1)
    if kept.shape[-1] == log_q.shape[-1]:
        return kl
    rest_p, rest_q = ((1 - x.exp().sum(-1, dtype=torch.float64)).clamp_min(1e-9) for x in (teacher.log_p, kept))
    return kl + rest_p * (rest_p / rest_q).log()


class WindowKl(NamedTuple):
    """The mean divergence of a window, the number of equal top-1 predictions, and the divergence of each token,
    float32 [tokens]."""

    mean: float
    agreed: int
    tokens: np.ndarray


def window_kl(logits: Tensor, teacher: Teacher) -> WindowKl:
    """The divergence of `logits` [tokens, vocabulary]."""
    total, agreed, rows, tokens = 0.0, 0, _rows(logits), list[Tensor]()
    for q, p in zip(logits.split(rows), teacher.split(rows), strict=True):
        top1 = p.argmax(-1) if isinstance(p, Tensor) else p.tokens[:, 0]
        agreed += int((q.argmax(-1) == top1).sum())
        tokens.append(token_kl(q, p).detach())
        total += float(tokens[-1].sum(dtype=torch.float64))
    return WindowKl(total / len(logits), agreed, torch.cat(tokens).float().cpu().numpy())


def percentiles(found: Sequence[WindowKl]) -> tuple[float | None, float | None]:
    """The 99th and the 99.9th percentile of the divergence over all tokens of some windows, as `llama-perplexity`
    computes them, in six significant digits; None where they are not finite."""
    of = np.quantile(np.concatenate([window.tokens for window in found]), PERCENTILES)
    first, second = (float(f"{x:.6g}") if math.isfinite(x) else None for x in of)
    return first, second


def kl_grad(logits: Tensor, teacher: Teacher) -> Tensor:
    """The gradient of the divergence, summed over tokens, by `logits`; float32 [tokens, vocabulary]."""
    gradients, rows = list[Tensor](), _rows(logits)
    for q, p in zip(logits.split(rows), teacher.split(rows), strict=True):
        leaf = q.detach().float().requires_grad_()
        with torch.enable_grad():
            gradients += torch.autograd.grad(token_kl(leaf, p).sum(dtype=torch.float64), leaf)
    return torch.cat(gradients)


def _rows(logits: Tensor) -> int:
    return max(1, _ROW_BYTES // (4 * logits.shape[-1]))
