"""What the dense model predicts on held-out text, remembered in little memory, and how far another model's predictions
are from it.

Of each next-token distribution the `KEPT` likeliest tokens are remembered and the rest as one sum, which bounds the
Kullback-Leibler divergence from below and is exact for vocabularies up to that size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

KEPT = 256
_ROW_BYTES = 1 << 26  # of float32 log-probabilities worked on at once


class TopKTeacher(NamedTuple):
    """The log-probabilities float32 [tokens, k] of the likeliest tokens, and which they are, int32 [tokens, k]."""

    log_p: Tensor
    tokens: Tensor


def remember(logits: Tensor) -> TopKTeacher:
    """What is kept of the dense model's `logits` [tokens, vocabulary]."""
    k = min(KEPT, logits.shape[-1])
    parts = [functional.log_softmax(part.float(), -1).topk(k) for part in logits.split(_rows(logits))]
    return TopKTeacher(torch.cat([p.values for p in parts]), torch.cat([p.indices.int() for p in parts]))


def compare(logits: Tensor, targets: Tensor, dense: TopKTeacher) -> tuple[float, float]:
    """Mean divergence from the remembered distribution and mean negative log-likelihood of `targets` [tokens]."""
    kl, nll = 0.0, 0.0
    rows = _rows(logits)
    parts = zip(logits.split(rows), targets.split(rows), dense.log_p.split(rows), dense.tokens.split(rows), strict=True)
    for part, target, p, index in parts:
        log_q = functional.log_softmax(part.float(), -1)
        kl += float(_divergence(log_q, p, index))
        nll -= float(log_q.gather(1, target[:, None]).sum(dtype=torch.float64))
    return kl / len(targets), nll / len(targets)


def kl_grad(logits: Tensor, dense: TopKTeacher) -> tuple[float, Tensor]:
    """Mean divergence, and the gradient of its sum over tokens by the logits: float32 [tokens, vocabulary], entries up
    to one."""
    kl = 0.0
    gradients: list[Tensor] = []
    rows = _rows(logits)
    for part, p, index in zip(logits.split(rows), dense.log_p.split(rows), dense.tokens.split(rows), strict=True):
        leaf = part.detach().float().requires_grad_()
        with torch.enable_grad():
            divergence = _divergence(functional.log_softmax(leaf, -1), p, index)
        gradients.append(*torch.autograd.grad(divergence, leaf))
        kl += float(divergence.detach())
    return kl / len(logits), torch.cat(gradients)


def _divergence(log_q: Tensor, p: Tensor, index: Tensor) -> Tensor:
    """The divergence summed over tokens, float64; `log_q` [tokens, vocabulary]."""
    q = log_q.gather(1, index.long())
    kl = (p.exp() * (p - q)).sum(dtype=torch.float64)
    if q.shape[1] < log_q.shape[1]:
        rest_p, rest_q = ((1 - x.exp().sum(1, dtype=torch.float64)).clamp_min(1e-9) for x in (p, q))
        kl = kl + (rest_p * (rest_p / rest_q).log()).sum()
    return kl


def _rows(logits: Tensor) -> int:
    return max(1, _ROW_BYTES // (4 * logits.shape[-1]))
