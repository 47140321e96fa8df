"""RCO for units: gradients straight through numbers of parts, and plans that meet the budget."""

import pytest
import tiny
import torch

from billhook.architectures.units import find_units
from billhook.engine.removal import Removal
from billhook.errors import BillhookError
from billhook.evaluation.kl import token_kl
from billhook.methods.structured import STRUCTURED
from billhook.plan.table import Table
from billhook.racing.unit_levels import UnitLevels, by_descent, menu
from billhook.racing.units import UnitProblem
from billhook.steps.slim import SlimRequest, prepare
from billhook.steps.slim_allocation import sizes_of
from billhook.trials.unit_trials import UnitRunner

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 258, (8, 16), generator=torch.Generator().manual_seed(0))
OBS = Removal("obs", STRUCTURED.configure("obs", {"swaps": 0}))
CASES = [("llama", "channels,heads"), ("mixtral", "experts,channels")]  # with two blocks and one


def runner_of(name: str, kinds: str) -> UnitRunner:
    model = getattr(tiny, name)(num_hidden_layers=2 if name == "llama" else 1)
    halves = [{"input_ids": IDS[:4]}], {"input_ids": IDS[4:]}
    return UnitRunner(model, find_units(model, kinds.split(",")), *halves, OBS, experts="reap")


def divergence(levels: UnitLevels, rows: list[int]) -> float:
    kl = []
    for row in rows:
        ((logits, _),) = levels.runner.predictions({"input_ids": IDS[row : row + 1]})
        kl.append(token_kl(logits.double(), levels._teachers[row]))
    return float(torch.cat(kl).mean())


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_gradients_are_slopes_of_the_divergence_between_levels(name, kinds):
    with runner_of(name, kinds) as runner:
        sizes = sizes_of(runner.units, runner.model.config)
        levels = UnitLevels(runner, [menu(size) for size in sizes])
        chosen, rows = [max(0, count - 2) for count in levels.counts], [0, 2]
        found = levels.gradients(chosen, rows)
        assert [len(row) for row in found] == levels.counts
        for kind in kinds.split(","):
            i = max(i for i, unit in enumerate(runner.units) if unit.kind == kind)
            last = levels.counts[i] - 1
            slopes = []
            for step in (0.02, -0.02):
                before, after = (weights(levels, [*chosen[:i], k, *chosen[i + 1 :]]) for k in (chosen[i], last))
                with torch.no_grad():
                    for layer, old, new in zip(levels.layers, before, after, strict=True):
                        layer.weight.copy_(old + step * (new - old))
                slopes.append(divergence(levels, rows))
            slope = (slopes[0] - slopes[1]) / 0.04
            assert found[i][last] - found[i][chosen[i]] == pytest.approx(slope, rel=0.05, abs=1e-6)
            assert abs(slope) > 1e-6


def weights(levels: UnitLevels, chosen: list[int]) -> list[torch.Tensor]:
    levels.put_(chosen)
    return [layer.weight.clone() for layer in levels.layers]


@pytest.mark.parametrize(("name", "kinds"), CASES)
def test_a_plan_meets_the_budget_is_the_same_each_time_and_leaves_the_model_as_it_was(name, kinds):
    plans = []
    for _ in range(2):
        with runner_of(name, kinds) as runner, torch.no_grad():
            before = runner.model(IDS).logits
            sizes = sizes_of(runner.units, runner.model.config)
            gone = round(0.3 * sum(s.n for s in sizes))
            problem = UnitProblem(Table(()), 0.3, sizes=sizes, remove=gone, shape="per-layer")
            plans.append(by_descent(runner, problem, {"steps": 3, "windows": 2}))
            assert torch.equal(runner.model(IDS).logits, before)
            left = sum((s.count - plans[-1].units[s.name]) * s.parameters for s in sizes)
            assert abs(left - gone) <= max(s.step * s.parameters for s in sizes) / 2
    assert plans[0] == plans[1]


def test_slim_takes_it_as_an_allocator_and_never_ends_behind_uniform_on_held_out_windows(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2), words=False)
    given = {"units": "channels", "calibration": IDS, "allocator": "rco"}
    plan = prepare(SlimRequest(source, tmp_path / "out", 0.25, options={"steps": 2, "swaps": 0}, **given)).plan
    assert plan.made_by["allocator"] == "rco"
    tried = plan.made_by["racing"]["tried"]
    assert tried[plan.made_by["racing"]["best"]] == min(tried["uniform"], tried["rco"])
    with pytest.raises(BillhookError, match="steps=0"):
        prepare(SlimRequest(source, tmp_path / "out", 0.25, options={"steps": 0}, **given))
