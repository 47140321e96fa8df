"""Races are pure, drop what is clearly behind, and close in on the optimum of a hyperparameter."""

import math
from typing import Any

import pytest
import torch

from billhook import Table, allocate
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.allocators.atp import largest_beta
from billhook.plan.table import Row
from billhook.racing.hyperparameters import COARSE, HYPERPARAMETERS, MIDPOINTS, Space
from billhook.racing.race import AllocationProblem, Race, Trial, TrialBudget, paired_difference
from billhook.tasks import TASKS
from billhook.trials.trials import Losses

MEASURED = ("alpha_peak", "outlier_ratio:5", "wanda_mean", "block_loss:0.6")


CURVE = {"magnitude_quantiles": tuple(i / 16 for i in range(17))}


def made_up_table(blocks: int) -> Table:
    return Table(tuple(Row(f"b.{i}.w", i, "w", (8, 8), dict.fromkeys(MEASURED, 1.0 + i), CURVE) for i in range(blocks)))


def test_every_hyperparameter_is_an_option_with_a_legal_range():
    problem = AllocationProblem(made_up_table(5), None)
    for name, known in HYPERPARAMETERS.items():
        assert known.name in ALLOCATORS.options(name)
        for target in (0.1, 0.5, 0.9):
            uniform, end = known.span(5, target)
            low, high = sorted((uniform, end))
            assert all(low <= value <= high * (1 + 1e-9) for value in known.published(5, target))
            for value in (uniform, uniform + (end - uniform) / 40, end):
                plan = allocate(problem.table, target, allocator=name, **{known.name: value})
                spread = max(plan.sparsity.values()) - min(plan.sparsity.values())
                assert (spread < 1e-9) == (value == uniform or name == "global")


class MadeUp:
    """A runner whose losses are made up: a function of the plan, and noise that all plans share."""

    task = TASKS.get("text-generation")

    def __init__(self, loss: Any, windows: int = 16) -> None:
        self.heldout: Any = {"input_ids": torch.zeros(windows, 1)}
        self.loss, self.scored, self.pruned = loss, 0, []

    def prune(self, plan: Any) -> None:
        self.pruned.append(plan)

    def losses(self, first: int, last: int) -> Losses:
        self.scored += last - first
        found = [self.loss(self.pruned[-1]) + math.sin(9 * window) for window in range(first, last)]
        return Losses(found, found)


def raced(space: Space, loss: Any, budget: TrialBudget | None = None, windows: int = 16) -> Race:
    """A race over made-up losses, functions of the plan's options."""
    race = Race(MadeUp(lambda plan: loss(plan.made_by["allocator"], plan.made_by["options"]), windows))  # type: ignore[arg-type]
    problem = AllocationProblem(made_up_table(space.blocks), space.target)
    race.run(lambda race: space.schedule(problem, race), budget)
    return race


def test_the_race_closes_in_on_the_optimum():
    space, high = Space(("atp",), {}, 8, 0.6), largest_beta(8, 0.6)
    for best in (0.08, 0.31, 0.62, 0.95):
        race = raced(space, lambda name, options, best=best: abs((options.get("beta") or 0) - best * high))
        assert len(race.trials) <= 1 + len(COARSE) + MIDPOINTS
        assert len(race.trials) - 1 <= space.most()
        assert abs(race.best.options["beta"] - best * high) <= 0.1 * high


def test_allocators_that_are_clearly_behind_get_no_midpoints():
    race = raced(Space(("atp", "owl"), {}, 6, 0.5), lambda name, options: {"uniform": 0.5, "owl": 1.0}.get(name, 0.0))
    assert sum(t.allocator == "owl" for t in race.trials.values()) == len(COARSE)
    assert sum(t.allocator == "atp" for t in race.trials.values()) > len(COARSE)


def test_candidates_that_are_clearly_behind_are_dropped_early():
    """The noise is common to all, so that every paired difference is exact."""
    race = raced(Space(("owl",), {}, 6, 0.5), lambda name, options: options.get("lam", 0.0), windows=64)
    assert race.best.name == "uniform"
    assert all(trial.dropped and len(trial.kl) == 4 for trial in list(race.trials.values())[1:])
    assert race.runner.scored == 64 + 4 * (len(COARSE) + MIDPOINTS)


def test_a_difference_within_its_error_drops_nothing():
    race = Race(MadeUp(lambda plan: 0.0))  # type: ignore[arg-type]
    race.trials["uniform"] = Trial("uniform", "uniform", {}, [1.0, 3.0, 1.0, 3.0])
    assert not race.behind(Trial("noisy", "owl", {}, [2.5, 2.0, 2.5, 2.0]))  # 0.25 more, but 1.0 on two of four
    assert race.behind(Trial("worse", "owl", {}, [1.2, 3.3, 1.3, 3.2]))


def test_grid_is_the_published_one():
    def options(space: Space) -> list[dict[str, Any]]:
        return [options for _, options in space.first()[1:]]

    betas = [found["beta"] for found in options(Space(("atp",), {}, 32, 0.7, grid=True))]
    assert betas == pytest.approx([0.002 * i for i in range(1, 10)])
    assert len(options(Space(("atp",), {}, 12, 0.5, grid=True))) == 45
    assert len(options(Space(("owl",), {}, 12, 0.5, grid=True))) == 20
    assert len(options(Space(("owl",), {"m": 5}, 12, 0.5, grid=True))) == 5
    assert len(raced(Space(("dlp",), {}, 5, 0.5, grid=True), lambda name, options: 0.0).trials) == 4


def test_budgets_bound_new_trials_but_allow_one():
    space = Space(("owl",), {}, 6, 0.5)
    assert len(raced(space, lambda name, options: 0.0, TrialBudget(trials=3)).trials) == 4
    assert len(raced(space, lambda name, options: 0.0, TrialBudget(seconds=1e-9)).trials) == 2


def test_differences_between_trials_are_paired_over_windows():
    a = Trial("a", "atp", {}, [1.0, 2.0], [0.0, 0.0], True)
    b = Trial("uniform", "uniform", {}, [0.5, 1.0, 9.0], [1.0, 1.0, 1.0])
    assert paired_difference(a, b, "kl") == pytest.approx((0.75, 0.25))
    assert paired_difference(a, b, "nll") == pytest.approx((-1.0, 0.0))
