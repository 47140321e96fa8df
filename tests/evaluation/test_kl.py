"""KL divergence and top-1 agreement: against the definition, the top-K bound, and the gradient."""

import math

import pytest
import torch
from torch.nn import functional

from billhook.evaluation import kl
from billhook.evaluation.kl import TopKTeacher, kl_grad, token_kl, window_kl

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
    assert window_kl(DENSE, DENSE) == (0, 7)


def test_top_k_is_a_lower_bound_and_exact_where_the_vocabulary_is_small(monkeypatch: pytest.MonkeyPatch):
    exact = token_kl(LOGITS, DENSE)
    for k in (1, 8, 256):
        monkeypatch.setattr(kl, "K", k)
        found = token_kl(LOGITS, TopKTeacher.of(DENSE))
        assert ((found > 0) & (found <= exact + 1e-6)).all()
    monkeypatch.setattr(kl, "K", 300)
    assert torch.allclose(token_kl(LOGITS, TopKTeacher.of(DENSE)).float(), exact, rtol=1e-5)


@pytest.mark.parametrize("top_k", [False, True])
def test_gradient_is_that_of_the_sum_over_tokens(top_k: bool):
    teacher = TopKTeacher.of(DENSE) if top_k else DENSE
    leaf = LOGITS.clone().requires_grad_()
    token_kl(leaf, teacher).sum().backward()
    assert torch.equal(kl_grad(LOGITS, teacher), leaf.grad)
    if not top_k:
        target, leaf.grad = DENSE.log_softmax(-1), None
        functional.kl_div(leaf.log_softmax(-1), target, reduction="sum", log_target=True).backward()
        assert torch.equal(kl_grad(LOGITS, teacher), leaf.grad)
        assert torch.allclose(leaf.grad, LOGITS.softmax(-1) - DENSE.softmax(-1), atol=1e-5)
