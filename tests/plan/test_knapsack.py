"""The multiple-choice knapsack against trying everything."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billhook.errors import BillhookError
from billhook.plan import knapsack
from billhook.plan.knapsack import choose_levels

GROUPS = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


@given(GROUPS, st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_no_choice_within_the_budget_has_a_smaller_loss(groups, budget):
    costs, losses = [[c for c, _ in g] for g in groups], [[x for _, x in g] for g in groups]
    choices = list(itertools.product(*(range(len(g)) for g in groups)))

    def total(values, choice):
        return sum(v[i] for v, i in zip(values, choice, strict=True))

    possible = [c for c in choices if total(costs, c) <= budget]
    if not possible:
        with pytest.raises(BillhookError, match="The least possible is"):
            choose_levels(costs, losses, budget)
        return
    found = choose_levels(costs, losses, budget)
    assert total(costs, found) <= budget
    assert total(losses, found) <= min(total(losses, c) for c in possible) + 1e-9


def test_coarse_units_stay_within_the_budget_and_close_to_the_best(monkeypatch):
    draw = random.Random(0)
    costs = [sorted(draw.randint(10**5, 10**6) for _ in range(4)) for _ in range(6)]
    losses = [sorted((draw.random() for _ in range(4)), reverse=True) for _ in range(6)]
    budget = sum(c[1] for c in costs) + 12345
    monkeypatch.setattr(knapsack, "UNITS", 500)
    found = choose_levels(costs, losses, budget)
    choices = itertools.product(range(4), repeat=6)
    best = min(
        sum(x[i] for x, i in zip(losses, c, strict=True))
        for c in choices
        if sum(x[i] for x, i in zip(costs, c, strict=True)) <= budget
    )
    assert sum(x[i] for x, i in zip(costs, found, strict=True)) <= budget
    assert sum(x[i] for x, i in zip(losses, found, strict=True)) <= 1.1 * best


def test_what_is_left_of_the_budget_is_smaller_than_any_useful_step():
    costs, losses = [[10, 25, 47]] * 3, [[3.0, 2.0, 1.0], [1.0, 0.5, 0.1], [9.0, 5.0, 1.0]]
    for budget in range(30, 150):
        found = choose_levels(costs, losses, budget)
        left = budget - sum(c[i] for c, i in zip(costs, found, strict=True))
        steps = [costs[g][i + 1] - costs[g][i] for g, i in enumerate(found) if i < 2]
        assert all(left < step for step in steps)
