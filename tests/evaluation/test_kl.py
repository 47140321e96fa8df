"""KL divergence and top-1 agreement: against the definition, the top-K bound, and the gradient."""

import math

import numpy as np
import pytest
import torch

from billhook.evaluation import kl
from billhook.evaluation.kl import Against, TopKTeacher, WindowKl, kl_grad, percentiles, token_kl, window_kl

LOGITS, DENSE = 3 * torch.randn(2, 7, 300, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work on two tokens at a time."""
    monkeypatch.setattr(kl, "_ROW_BYTES", 2 * 4 * 300)


def test_divergence_and_agreement_are_those_of_the_definition():
    expected = same = 0.0
    for p, q in zip(DENSE.double().softmax(-1).tolist(), LOGITS.double().softmax(-1).tolist(), strict=True):
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        same += p.index(max(p)) == q.index(max(q))
    for teacher in (DENSE, TopKTeacher.of(DENSE)):
        assert window_kl(LOGITS, teacher)[1] == same
    assert window_kl(LOGITS, DENSE)[0] == pytest.approx(expected / 7, rel=1e-5)
    found = window_kl(DENSE, DENSE)
    assert (found.mean, found.agreed, found.tokens.tolist()) == (0, 7, [0] * 7)
    assert window_kl(LOGITS, DENSE).tokens.tolist() == pytest.approx(token_kl(LOGITS, DENSE).tolist())


@pytest.mark.parametrize("k", [1, 8, 299])
def test_top_k_keeps_the_most_likely_tokens_and_one_bucket_for_the_others(k: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "K", k)
    expected = []
    for p, q in zip(DENSE.double().softmax(-1).tolist(), LOGITS.double().softmax(-1).tolist(), strict=True):
        kept = sorted(range(300), key=lambda token: -p[token])[:k]
        pairs = [(p[token], q[token]) for token in kept]
        pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
        expected.append(sum(a * math.log(a / b) for a, b in pairs))
    assert token_kl(LOGITS, TopKTeacher.of(DENSE)).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_certain_teacher_leaves_nothing_for_the_bucket(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kl, "K", 1)
    certain = torch.full((7, 300), -1e4).index_fill(1, torch.tensor([3]), 0.0)
    expected = -LOGITS.double().log_softmax(-1)[:, 3]
    assert token_kl(LOGITS, TopKTeacher.of(certain)).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("k", [None, 8])
def test_gradient_is_that_of_the_sum_over_tokens(k: int | None, monkeypatch: pytest.MonkeyPatch):
    p, q = DENSE.softmax(-1), LOGITS.softmax(-1)
    if k is None:
        assert torch.allclose(kl_grad(LOGITS, DENSE), q - p, atol=1e-6)
        return
    monkeypatch.setattr(kl, "K", k)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, p.topk(k).indices, True)
    rest = (p * ~kept).sum(-1, keepdim=True) / (q * ~kept).sum(-1, keepdim=True)
    expected = torch.where(kept, q - p, q * (1 - rest))
    assert torch.allclose(kl_grad(LOGITS, TopKTeacher.of(DENSE)), expected, atol=1e-5)


def test_the_error_is_that_of_a_mean_of_windows():
    windows = [WindowKl(mean, 1, np.array([mean], np.float32)) for mean in (0.1, 0.2, 0.6)]
    found = Against.of("dense", windows, 4, 2.0)
    deviation = math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2)
    assert (found.kl, found.kl_error) == pytest.approx((0.3, deviation / math.sqrt(3)))
    assert (found.top1_agreement, found.token_ppl) == (0.75, pytest.approx(math.exp(2)))
    assert Against.of("dense", windows[:1], 4, 2.0).kl_error is None


def test_percentiles_are_over_the_tokens_of_all_windows():
    """Of 0 ... 2000 the 99th is 1980 and the 99.9th 1998; between two tokens they are interpolated."""
    tokens = np.random.default_rng(0).permutation(2001).astype(np.float32)
    assert percentiles([WindowKl(0.0, 0, part) for part in (tokens[:300], tokens[300:])]) == (1980, 1998)
    assert percentiles([WindowKl(0.0, 0, np.arange(11, dtype=np.float32))]) == pytest.approx((9.9, 9.99))
    assert percentiles([WindowKl(0.0, 0, np.array([1, np.nan], np.float32))]) == (None, None)
