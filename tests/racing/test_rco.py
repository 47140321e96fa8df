"""RCO: a descent on the budget's surface, and gradients straight through the choice of levels."""

import random
from functools import partial

import pytest
import tiny
import torch

from billhook.architectures.layers import find_layers
from billhook.engine.method import Method, Quantization
from billhook.errors import BillhookError
from billhook.methods.quantize import QUANTIZERS
from billhook.plan.knapsack import choose_levels
from billhook.plan.spec import Spec
from billhook.racing.candidates import CandidateWeights
from billhook.racing.rco import Descent, rco
from billhook.trials.trials import TrialRunner

ROUND = Quantization("round", QUANTIZERS.configure("round", {}))
IDS = torch.randint(0, 258, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(2))
def test_a_separable_loss_ends_next_to_the_knapsacks_optimum_and_every_step_meets_the_budget(seed: int):
    draw = random.Random(seed)
    costs = [sorted(draw.randint(10, 100) for _ in range(draw.choice([2, 3, 4]))) for _ in range(40)]
    losses = [sorted((draw.random() for _ in c), reverse=True) for c in costs]
    budget = sum(c[0] for c in costs) + 700
    descent = Descent(costs, budget, rate=0.3, temperature=1.0, seed=seed)
    for _ in range(60):
        descent.draw()
        descent.update_(losses)
        assert descent.expected(descent.z) == pytest.approx(budget, rel=1e-9)

    def total(values, choice):
        return sum(v[k] for v, k in zip(values, choice, strict=True))

    found, best = descent.best(), choose_levels(costs, losses, budget)
    assert total(costs, found) <= budget
    assert total(losses, found) <= total(losses, best) + 0.05 * (total(losses, [0] * 40) - total(losses, best))


def test_steps_stay_on_the_surface_to_first_order():
    """A gradient along the budget's normal moves nothing."""
    costs = [[10, 20, 40], [5, 30]]
    descent = Descent(costs, 45, rate=0.1, temperature=0.0, seed=0)
    before = descent.p
    descent.draw()
    descent.update_([[0.1 * x for x in row] for row in costs])  # ∂L/∂p = c: the normal itself
    assert torch.allclose(descent.p, before, atol=1e-6)


@pytest.mark.gate
@pytest.mark.parametrize("model", [tiny.llama, partial(tiny.mixtral, num_experts_per_tok=4)])
def test_gradients_are_slopes_of_the_divergence_between_levels(model):
    model = model()
    layers = find_layers(model)
    groups = [(layer.name,) for layer in layers[:-2]] + [tuple(layer.name for layer in layers[-2:])]
    menu = [Spec(type=f"int{b}/16") for b in (3, 4, 8)]
    with TrialRunner(model, layers, [{"input_ids": IDS[:6]}], {"input_ids": IDS[6:]}, ROUND) as runner:
        weights = CandidateWeights(runner, groups, [menu] * len(groups), {"input_ids": IDS[:6]}, ROUND)
        chosen, rows = [1] * len(groups), [0, 3]
        found = weights.gradients(chosen, rows)
        assert [len(x) for x in found] == [3] * len(groups)
        for k in (0, len(groups) - 1):
            inside = [layer for layer in layers if layer.name in groups[k]]
            slopes = []
            for step in (0.05, -0.05):
                weights.put_(chosen)
                for layer in inside:
                    other = weights._encoded[layer.name][0].decode(torch.float32)
                    with torch.no_grad():
                        layer.weight.add_(step * (other - layer.weight))
                slopes.append(divergence(weights, rows))
            slope = (slopes[0] - slopes[1]) / 0.1
            assert found[k][0] - found[k][1] == pytest.approx(slope, rel=0.05, abs=1e-7)
    assert not any(p.grad is not None for p in model.parameters())


def divergence(weights: CandidateWeights, rows) -> float:
    from billhook.evaluation.kl import token_kl

    kl = []
    for row in rows:
        ((logits, _),) = weights.runner.predictions({"input_ids": IDS[row : row + 1]})
        kl.append(token_kl(logits.double(), weights._teachers[row]))
    return float(torch.cat(kl).mean())


@pytest.mark.gate
def test_bits_and_sparsities_are_chosen_within_the_budget_the_same_way_each_time():
    model = tiny.llama(num_hidden_layers=2)
    layers = find_layers(model)
    groups, n = [(layer.name,) for layer in layers], [layer.weight.numel() for layer in layers]
    cases = [
        (ROUND, [Spec(type=f"int{b}/16") for b in (2, 4)], [[x // 4, x // 2] for x in n], sum(n) * 3 // 8),
        (Method("magnitude", {}), [Spec(0.75), Spec(0.5), Spec(0.0)], [[x // 4, x // 2, x] for x in n], sum(n) // 2),
    ]
    for method, menu, costs, budget in cases:
        with TrialRunner(model, layers, [{"input_ids": IDS[:6]}], {"input_ids": IDS[6:]}, method) as runner:
            weights = CandidateWeights(runner, groups, [menu] * len(groups), {"input_ids": IDS[:6]}, method)
            found = [rco(weights, costs, budget, steps=3, windows=2) for _ in range(2)]
            with pytest.raises(BillhookError, match="steps=0"):
                rco(weights, costs, budget, steps=0)
        assert found[0] == found[1]
        assert budget * 0.9 < sum(c[k] for c, k in zip(costs, found[0], strict=True)) <= budget
