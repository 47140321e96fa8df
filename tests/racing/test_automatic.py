"""`--allocator auto` and hyperparameters given as `auto`: exact, deterministic, never worse than uniform."""

import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from command import contents
from resuming import whole_and_in_parts
from safetensors.torch import save_file

from billhook import BillhookError, allocate, load_model, measure, prune
from billhook.comparison.grid import Grid, compare
from billhook.engine.batch import rows_of
from billhook.engine.method import Method
from billhook.measurement.error_curves import TRIED, cheaper, curve_through
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators.curves import MIDDLE
from billhook.plan.plan import Plan
from billhook.plan.table import Row, Table
from billhook.racing.automatic import ROUNDS, ErrorCurves, needs, schedule
from billhook.racing.hyperparameters import COARSE, MIDPOINTS, Space
from billhook.racing.race import AllocationProblem, Race
from billhook.steps.prune import prepare
from billhook.steps.prune_job import PruneRequest
from billhook.steps.request import open_request
from billhook.tasks import TASKS
from billhook.trials.attribution import FLOOR
from billhook.trials.heldout import split_samples
from billhook.trials.trials import Losses, TrialRunner

pytestmark = pytest.mark.gate


def text(windows: int = 16) -> torch.Tensor:
    return torch.randint(0, 258, (windows, 24), generator=torch.Generator().manual_seed(0))


def divergence(plan: Plan, request: PruneRequest) -> float:
    """On the held-out windows that the plan says it was tried on."""
    opened = open_request(request, True, "x")
    split = split_samples(opened.model, opened.samples, rows_of(opened.batches[0]), request.seed)
    assert plan.made_by["racing"]["heldout"] == split.facts["heldout"]
    options = {**cheaper(request.criterion, opened.layers), **{k: v for k, v in request.options.items() if v != "auto"}}
    method = Method(request.criterion, CRITERIA.configure(request.criterion, options))
    args = opened.model, opened.layers, split.batches, split.heldout, method
    with TrialRunner(*args) as runner:
        runner.prune(plan)
        return statistics.fmean(runner.losses(0, rows_of(split.heldout)).kl)


@pytest.mark.parametrize("criterion", ["wanda", pytest.param("admm", marks=pytest.mark.nightly)])
def test_auto_is_exact_deterministic_and_not_worse_than_uniform(criterion: str) -> None:
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    request = PruneRequest(model, 0.6, criterion=criterion, allocator="auto", calibration=text())
    job, again = prepare(request), prepare(request)
    assert job.plan == again.plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = {layer.name: layer.shape for layer in job.opened.layers}
    assert sum(job.plan.zeros(shapes).values()) == round(0.6 * sum(a * b for a, b in shapes.values()))
    racing = job.plan.made_by["racing"]
    names = list(racing["tried"])
    assert names[:2] == ["uniform", "curves"]
    rounds = [name for name in names if name.startswith("curves, round")]
    assert rounds == [f"curves, round {number}" for number in range(2, len(rounds) + 2)]
    assert 1 <= len(rounds) < ROUNDS
    assert len(names) == 2 + len(rounds)
    assert needs("auto", criterion) == (f"error_curve:{criterion}",)
    complete = {name: loss for name, loss in racing["tried"].items() if name not in racing["dropped"]}
    assert complete[racing["best"]] == min(complete.values()) <= complete["uniform"]
    assert divergence(job.plan, request) == pytest.approx(min(complete.values()), rel=1e-5)


@pytest.mark.parametrize("criterion", ["wanda", "magnitude"])
def test_beta_is_chosen_in_a_few_trials_and_recorded(criterion: str) -> None:
    options = {"beta": "auto"}
    request = PruneRequest(tiny.llama(), 0.6, criterion=criterion, allocator="atp", options=options, calibration=text())
    plan = prepare(request).plan
    racing = plan.made_by["racing"]
    assert 1 + len(COARSE) <= len(racing["tried"]) <= 1 + len(COARSE) + MIDPOINTS
    assert racing["tried"][racing["best"]] <= racing["tried"]["uniform"]
    assert divergence(plan, request) == pytest.approx(racing["tried"][racing["best"]], rel=1e-5)
    if racing["best"] != "uniform":
        beta = plan.made_by["options"]["beta"]
        assert plan.sparsity == allocate(measure(tiny.llama(), []), 0.6, allocator="atp", beta=beta).sparsity


@pytest.mark.nightly
def test_other_options_of_a_raced_allocator_are_kept(tmp_path: Path) -> None:
    save_file({"tokens": text()}, tmp_path / "text.safetensors")
    fields = {"allocator": "owl", "lam": "auto", "m": 3, "calibration": str(tmp_path / "text.safetensors")}
    report = prune(tiny.save(tmp_path / "model"), sparsity=0.6, length=24, output=tmp_path / "out", **fields)
    tried = report.plan.made_by["racing"]["tried"]
    assert all(name == "uniform" or name.endswith(" m=3") for name in tried)


@pytest.mark.nightly
def test_a_run_whose_allocation_was_raced_is_resumed_without_another_race(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    fields = {"sparsity": 0.6, "calibration": text(), "dtype": "float32"}
    whole_and_in_parts(source, tmp_path, 2, **fields)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    record = json.loads((tmp_path / "parts" / "billhook.json").read_text())["steps"][0]
    assert record["made_by"]["recipe"] == "good"
    assert record["plan"]["made_by"]["racing"]["tried"]


@pytest.mark.nightly
def test_trials_have_the_options_that_are_given() -> None:
    request = PruneRequest(
        tiny.llama(), 0.6, criterion="admm", allocator="auto", calibration=text(), options={"steps": 1}
    )
    racing = prepare(request).plan.made_by["racing"]
    assert divergence(prepare(request).plan, request) == pytest.approx(racing["tried"][racing["best"]], rel=1e-5)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.5])
def test_the_share_of_a_layer_that_a_later_plan_hardly_prunes_is_the_one_measured_before(target: float) -> None:
    """One layer has thirty times the share of each other; what is measured of it under the plan is the floor."""
    truth = {f"layers.{block}": 3.0 if block == 0 else 0.1 for block in range(8)}
    curve = {"error_curve:wanda": tuple(curve_through(TRIED, [0.002, 0.02, 0.15, 0.6]))}
    table = Table(tuple(Row(n, i, "a", (64, 64), {}, curve) for i, n in enumerate(truth)), {})
    curves = ErrorCurves(AllocationProblem(table, target), "wanda")
    race = SimpleNamespace(plans={"uniform": curves.uniform, "curves": curves.optimum(truth)}, trials={})
    for name, plan in race.plans.items():
        relative = {layer: curves._error(layer, s) / curves._error(layer, MIDDLE) for layer, s in plan.sparsity.items()}
        under = {layer: share * relative[layer] * (plan.sparsity[layer] > 0) for layer, share in truth.items()}
        floor = FLOOR * statistics.fmean(under.values())
        race.trials[name] = SimpleNamespace(shares={layer: max(share, floor) for layer, share in under.items()})
    found = [curves.shares(race, name) for name in race.plans]
    assert found[0] == pytest.approx(truth)
    assert curves.mean(found) == pytest.approx(truth, rel=0.5)


class MadeUpRunner:
    """Its losses are those of `losses`, one a trial; the windows differ by little."""

    task = TASKS.get("text-generation")

    def __init__(self, losses: list[float]) -> None:
        self.heldout, self.left, self.attributed = {"input_ids": torch.zeros(16, 1)}, list(losses), 0

    def prune(self, plan: Plan) -> None:
        self.loss = self.left.pop(0)

    def losses(self, first: int, last: int) -> Losses:
        found = [self.loss + 1e-3 * (window % 2) * self.loss for window in range(first, last)]
        return Losses(found, found)

    def attribute(self) -> dict[str, float]:
        self.attributed += 1
        return dict.fromkeys((f"layers.{block}" for block in range(4)), 1.0)


@pytest.mark.parametrize(
    ("losses", "rounds", "attributed"),
    [
        ([4.0, 3.0, 2.0, 1.0, 0.5], 4, 4),  # the last round needs no shares
        ([4.0, 3.0, 2.0, 2.0], 3, 4),  # no better: the first of equals is the best
        ([4.0, 4.0, 3.0, 5.0], 3, 3),  # equal to uniform at first; dropped at the end
        ([4.0, 5.0], 1, 1),  # clearly behind uniform: the next plan would be the same
    ],
)
def test_rounds_end_where_they_do_not_help(losses: list[float], rounds: int, attributed: int) -> None:
    curve = {"error_curve:wanda": tuple(curve_through(TRIED, [0.002, 0.02, 0.15, 0.6]))}
    table = Table(tuple(Row(f"layers.{i}", i, "a", (64, 64), {}, curve) for i in range(4)), {})
    runner, problem = MadeUpRunner(losses), AllocationProblem(table, 0.5)
    race = Race(runner)  # type: ignore[arg-type]
    race.run(lambda race: schedule(Space(("auto",), {}, 4, 0.5), problem, "wanda", race))
    assert len(race.trials) == 1 + rounds
    assert runner.attributed == attributed
    assert not runner.left


def test_options_that_auto_would_not_read_are_refused(tmp_path: Path) -> None:
    fields = {"sparsity": 0.5, "allocator": "auto", "strength": 0.5, "output": tmp_path / "out"}
    with pytest.raises(BillhookError, match="does not have an option 'strength'"):
        prune(tiny.save(tmp_path / "model"), **fields)


def test_auto_is_refused_without_a_model() -> None:
    table = measure(tiny.llama(), ["error_curve:wanda", "loss_share:wanda"], batches=text(8))
    for options in ({"allocator": "auto"}, {"allocator": "atp", "beta": "auto"}):
        with pytest.raises(BillhookError, match=r"auto tries plans on a model.*allocate with curves"):
            allocate(table, 0.5, **options)
    plan = allocate(table, 0.5, allocator="curves", criterion="wanda")
    assert sum(plan.zeros(table.shapes).values()) == round(0.5 * table.total)
    assert len(set(plan.sparsity.values())) > 3


def test_auto_in_a_comparison_is_what_prune_does(tmp_path: Path) -> None:
    """The same plan, so the same sparsity of every block; and the weights are put back between cells."""
    save_file({"tokens": text()}, tmp_path / "text.safetensors")
    source, model = str(tmp_path / "text.safetensors"), tiny.save(tmp_path / "model")
    found = compare(model, Grid((0.6,), ("uniform", "auto"), ("wanda",)), source, calibration=source, length=24)
    plan = prepare(PruneRequest(model, 0.6, criterion="wanda", allocator="auto", calibration=source)).plan
    rows = {row["allocator"]: row for row in found.cells}
    blocks = {
        str(b): sum(plan.sparsity[r.layer] * r.n for r in rs) / sum(r.n for r in rs) for b, rs in _rows(model).items()
    }
    assert rows["auto"]["sparsity_by_block"] == pytest.approx(blocks)
    assert rows["auto"]["sparsity_by_block"] != pytest.approx(rows["uniform"]["sparsity_by_block"])


def _rows(model: Path) -> dict:
    return measure(load_model(model), []).blocks()


def test_auto_is_uniform_with_a_reason_where_text_is_short() -> None:
    plan = prepare(PruneRequest(tiny.llama(), 0.6, criterion="wanda", allocator="auto", calibration=text(3))).plan
    assert set(plan.sparsity.values()) == {0.6}
    assert "too few to split" in plan.made_by["racing"]["reason"]


def test_patterns_keep_their_groups() -> None:
    plan = prepare(
        PruneRequest(tiny.llama(), pattern="4:8", criterion="wanda", allocator="auto", calibration=text(8))
    ).plan
    assert all(round(8 * s) == pytest.approx(8 * s) for s in plan.sparsity.values())
