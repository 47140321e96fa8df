"""Contracts of every objective, by name from the registry, and plain-loop oracles of their values."""

import functools

import bert
import pytest
import tiny
import torch

from billhook.errors import BillhookError
from billhook.recovery.objectives import OBJECTIVES
from billhook.recovery.outputs import predictor
from billhook.tasks.feature_extraction import TASK as FEATURES
from billhook.tasks.text_generation import TASK

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "written": IDS.flip(1)}


def objective(name: str, **options):
    return functools.partial(OBJECTIVES.get(name), **OBJECTIVES.configure(name, options))


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_an_objective_is_a_finite_scalar_that_falls_along_its_gradient(name):
    """And it is zero for the teacher itself, where it is a distance from the teacher."""
    model, teacher = tiny.llama(0, num_hidden_layers=2), tiny.llama(1, num_hidden_layers=2)
    student, known = predictor(model, TASK, range(2)), predictor(teacher, TASK, range(2), gradients=False)
    loss = objective(name)(student, known, BATCH)
    assert loss.shape == ()
    loss.backward()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.grad is not None):
            p -= 1e-3 * p.grad
    assert objective(name)(student, known, BATCH).item() < loss.item()
    assert all(p.grad is None for p in teacher.parameters())
    if name in ("kl", "hidden", "kl+hidden"):
        assert float(objective(name)(known, known, BATCH)) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_values_are_those_of_plain_loops():
    models = [tiny.llama(seed, num_hidden_layers=2) for seed in (0, 1)]
    logits = [m(IDS).logits[:, :-1].double().softmax(-1).flatten(0, 1) for m in models]
    terms = (float(p[v] * (p[v] / q[v]).log()) for q, p in zip(*logits, strict=True) for v in range(258))
    kl = sum(terms) / len(logits[0])
    states = [m(IDS, output_hidden_states=True).hidden_states[1:-1] for m in models]
    ours, theirs = (s[0].double() for s in states)
    hidden = sum(float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(ours, theirs, strict=True)) / len(ours)
    text = -sum(float(p[y].log()) for p, y in zip(logits[0], IDS[:, 1:].flatten(), strict=True)) / len(logits[0])
    student, teacher = (predictor(m, TASK, range(1)) for m in models)
    batch = {"input_ids": IDS}
    assert float(objective("kl")(student, teacher, batch)) == pytest.approx(kl, rel=1e-5)
    assert float(objective("text")(student, teacher, batch)) == pytest.approx(text, rel=1e-5)
    assert float(objective("hidden")(student, teacher, batch)) == pytest.approx(hidden, rel=1e-5)
    together = float(objective("kl+hidden", weight=0.5)(student, teacher, batch))
    assert together == pytest.approx(kl + 0.5 * hidden, rel=1e-5)


def test_models_without_predictions_are_compared_by_their_embeddings():
    student, teacher = (predictor(bert.model(seed).bert, FEATURES) for seed in (0, 1))
    batch = {"input_ids": IDS}
    assert 0 < objective("kl")(student, teacher, batch).item() < 2
    with pytest.raises(BillhookError, match="needs labels"):
        objective("text")(student, teacher, batch)
