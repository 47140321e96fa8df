"""Search: schedules are legal and pure, trials agree with real masks, the split is disjoint, interruptions and reruns
change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import llama, mixtral, save, text_file
from typer.testing import CliRunner

from billhook import BillhookError, Table, allocate, find_layers, load_plan, prune_, search
from billhook.cli import app
from billhook.engine.gradients import compute_gradients
from billhook.methods.masks import Select
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.allocators.atp import largest_beta
from billhook.plan.table import Row
from billhook.racing.journal import Journal, Run, loss_difference
from billhook.racing.knobs import ALL, KNOBS, POINTS, Candidate, Outcome, Space, propose
from billhook.steps.request import Request
from billhook.steps.search import UNIFORM, Task
from billhook.text.windows import digest
from billhook.trials.ladder import ROW_RUNGS, Ladder


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(258, (12, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw only where the picture is looked at: drawing takes longer than everything else here."""
    if "same_bytes" not in request.node.name:
        monkeypatch.setattr("billhook.steps.search.draw", lambda *arguments: False)


def find(model: Any, tokens: torch.Tensor, **changes: Any) -> Any:
    return search(model, **({"sparsity": 0.5, "allocator": "atp", "calibration": tokens} | changes))


# -- the schedule

MEASURED = ("alpha_peak", "outlier_ratio:5", "wanda_mean", "block_loss:0.6")
CURVE = {"magnitude_quantiles": tuple(i / 16 for i in range(17))}


def follow(space: Space, loss: Any, limit: int) -> list[Outcome]:
    """Let the schedule run on a made-up loss of (allocator, knob's value)."""
    past: list[Outcome] = []
    while len(past) < limit and (candidate := propose(space, past)) is not None:
        past.append(Outcome(candidate, loss(candidate), False))
    return past


def test_every_knob_is_an_option_with_a_legal_range():
    table = Table(tuple(Row(f"b.{i}.w", i, "w", (8, 8), dict.fromkeys(MEASURED, 1.0 + i), CURVE) for i in range(5)))
    for name, knob in KNOBS.items():
        assert knob.name in ALLOCATORS.options(name)
        for target in (0.1, 0.5, 0.9):
            high = knob.high(5, target)
            assert all((value > 0 or knob.falling) and value <= high * (1 + 1e-9) for value in knob.grid(5, target))
            for fraction in (0, 1 / 40, 1):
                plan = allocate(table, target, allocator=name, **{knob.name: knob.value(fraction, 5, target)})
                assert (max(plan.sparsity.values()) - min(plan.sparsity.values()) < 1e-9) == (
                    fraction == 0 or name == "global"
                )


def test_adaptive_schedule_closes_in_on_the_optimum():
    space = Space(("atp",), {}, 8, 0.6)
    high = largest_beta(8, 0.6)
    past = follow(space, lambda c: abs(c.options["beta"] - 0.31 * high), POINTS)
    assert len(past) == POINTS == space.points
    assert min(o.score for o in past) <= high / 40 + 1e-12
    assert len({o.candidate.options["beta"] for o in past}) == POINTS


def test_schedule_ends_and_never_repeats():
    space = Space(("atp", "owl", "er"), {}, 6, 0.5)
    past = follow(space, lambda c: sum(c.options.values()) if c.tick else 0.0, 1000)
    keys = [(o.candidate.allocator, str(o.candidate.options)) for o in past]
    assert len(set(keys)) == len(keys) < 60


def test_allocators_that_are_clearly_behind_are_not_refined():
    space = Space(("atp", "owl"), {}, 6, 0.5)
    past: list[Outcome] = []
    while (candidate := propose(space, past)) is not None:
        past.append(Outcome(candidate, 0.0 if candidate.allocator == "atp" else 1.0, candidate.allocator == "owl"))
    assert sum(o.candidate.allocator == "owl" for o in past) == 5


def test_grid_is_the_published_one():
    betas = [c.options["beta"] for c in Space(("atp",), {}, 32, 0.7, grid=True).candidates()]
    assert betas == pytest.approx([0.002 * i for i in range(1, 10)])
    assert len(list(Space(("atp",), {}, 12, 0.5, grid=True).candidates())) == 45
    owl = list(Space(("owl",), {}, 12, 0.5, grid=True).candidates())
    assert len(owl) == 20
    assert len(list(Space(("owl",), {"m": 5}, 12, 0.5, grid=True).candidates())) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [({"beta": "0.1"}, "leave out --set beta"), ({"betta": "1"}, "betta"), ({"m": "many"}, "m='many'")],
)
def test_given_options_are_checked(given: dict[str, str], message: str, tokens: torch.Tensor):
    with pytest.raises(BillhookError, match=message):
        find(llama(), tokens, allocator=["atp", "owl"], options=given)


# -- masks


@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("shape", [(48, 32), (16, 400)])
def test_ladder_agrees_with_selection(group: Any, shape: tuple[int, int]):
    score = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    ladder, total = Ladder.of(score, group), score.numel()
    for sparsity in (0.0, 0.01, 0.3, 0.5, 0.777, 1.0):
        keep = ladder.at(sparsity)(score)
        zeros = round(sparsity * total)
        step = total / (min(total, 8192) if group == "layer" else shape[0] * min(shape[1], ROW_RUNGS))
        assert abs(int((~keep).sum()) - zeros) <= max(1, step) + shape[0] * (shape[1] > ROW_RUNGS)
        exact = Select(shape, sparsity, zeros, None, group)(score)
        assert int((keep != exact).sum()) <= 2 * shape[0] * max(1, shape[1] // ROW_RUNGS)


@pytest.mark.parametrize("criterion", ["wanda", "magnitude", "gblm", "gradient"])
def test_a_trial_of_the_first_block_is_a_full_run_of_it(criterion: str, tokens: torch.Tensor):
    """The first block's inputs are the same whether the others are pruned or not; masks may differ where a row loses
    one more."""
    task = Task(Request(llama(), 0.5, criterion=criterion, calibration=tokens), ("atp",), "kl", False)
    plan = task.plan(task.space.at("atp", 20))
    first = task.bench.layers[0]
    with task.bench as bench:
        bench.trial(plan)
        cheap = first.weight == 0
        bench.prune(plan)
        assert ((first.weight == 0) != cheap).float().mean() < 0.05
    assert torch.equal(first.weight, find_layers(llama())[0].weight)


def test_losses_of_the_dense_model(tokens: torch.Tensor):
    task = Task(Request(llama(), 0.5, calibration=tokens), ("atp",), "kl", False)
    task.bench.trial(allocate(task.table, 0.0))
    losses = task.bench.losses(0, 6)
    assert max(map(abs, losses.kl)) < 1e-5
    logits = task.bench.model(task.split.heldout[:1]).logits[0, :-1].detach()
    assert losses.nll[0] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, task.split.heldout[0, 1:])), abs=1e-5
    )
    task.bench.trial(task.plan(UNIFORM))
    assert min(task.bench.losses(0, 6).kl) > 0


def test_divergence_with_a_sum_for_unlikely_tokens_is_a_lower_bound(
    tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    found = {}
    for kept in (8, 258):
        monkeypatch.setattr("billhook.trials.predictions.KEPT", kept)
        task = Task(Request(llama(), 0.5, calibration=tokens), ("atp",), "kl", False)
        task.bench.trial(task.plan(UNIFORM))
        found[kept] = task.bench.losses(0, 6).kl
    assert all(0 < low <= high + 1e-6 for low, high in zip(found[8], found[258], strict=True))


def test_patterns_experts_and_stand_ins(tokens: torch.Tensor):
    result = find(llama(), tokens, sparsity=None, pattern="4:8", budget=2)
    assert str(result.plan.pattern) == "4:8"
    model = mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = find(model, tokens, criterion="sparsegpt", budget=2)
    assert result.record["identity"]["proxy"] == "wanda"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- the search


def test_several_allocators_and_finalists(tokens: torch.Tensor):
    names = tuple(name for name in ALL if name != "atp")  # whose grid is long where blocks are few
    result = find(llama(), tokens, allocator=names, grid=True, options={"m": 5}, finalists=2)
    assert {run.candidate.allocator for run in result.trials} == {"uniform", *names}
    assert len(result.trials) == 1 + len(list(Space(names, {"m": 5}, 4, 0.5, True).candidates()))
    assert not any(run.stopped for run in result.trials)
    assert 2 <= len(result.full) <= 1 + 2 * len(names)
    assert len(find(llama(), tokens, budget=len(ALL), allocator="all").trials) == 1 + len(ALL)
    assert {
        run.candidate.allocator for run in find(llama(), tokens, allocator="global,sensitivity", budget=2).trials
    } >= {
        "global",
        "sensitivity",
    }
    assert find(llama(), tokens, allocator="er").trials[1].candidate.allocator == "er"
    assert len(find(llama(), tokens, allocator="uniform").full) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", ["kl", "ppl"])
def test_never_worse_than_uniform(seed: int, objective: str, tokens: torch.Tensor):
    result = find(llama(seed), tokens, objective=objective, seed=seed, budget=4)
    name = {"kl": "kl", "ppl": "nll"}[objective]
    assert result.full[0].candidate == UNIFORM
    assert result.best.loss(name) == min(run.loss(name) for run in result.full)
    # The plan, applied as a user would to the calibration half, gives the very weights that were scored.
    task = Task(Request(llama(seed), 0.5, calibration=tokens, seed=seed), ("atp",), "kl", False)
    task.bench.prune(result.plan)
    assert task.bench.losses(0, 6).kl == result.best.kl
    model = llama(seed)
    prune_(model, result.plan, batches=task.split.batches)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(find_layers(model), task.bench.layers, strict=True))


@pytest.mark.parametrize("finalists", [1, 2])
def test_the_model_written_is_the_one_scored(finalists: int, tmp_path: Path):
    """Also where a later full run came after the winner's, and after a search that had ended is asked for its model."""
    model, text, out = save(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "found"
    fields: dict[str, Any] = {
        "allocator": "atp,owl",
        "calibration": text,
        "samples": 8,
        "length": 32,
        "budget": 4,
        "output": out,
    }
    result = search(model, 0.5, finalists=finalists, **fields, save_model=False)
    assert result.model is None
    assert not (out / "model").exists()
    result = search(model, 0.5, finalists=finalists, **fields)
    assert result.model == out / "model"
    record = json.loads((out / "model" / "billhook.json").read_text())
    (step,) = record["steps"]
    assert step["plan"] == json.loads((out / "plan.json").read_text())
    halves = result.record["identity"]["calibration"]
    assert step["made_by"]["calibration"]["digest"] == halves["calibration"]["digest"]
    assert step["made_by"]["search"]["heldout"] == halves["heldout"]
    task = Task(Request(out / "model", 0.5, calibration=text, samples=8, length=32), ("atp",), "kl", False)
    task.bench.trial(allocate(task.table, 0.0))
    assert task.bench.losses(0, 4).nll == pytest.approx(result.best.nll, abs=1e-5)
    before = (out / "model" / "billhook.json").stat().st_mtime_ns
    search(model, 0.5, finalists=finalists, **fields)
    assert (out / "model" / "billhook.json").stat().st_mtime_ns == before


def test_the_model_of_another_search_is_replaced_though_its_plan_is_the_same(tmp_path: Path):
    model, text, out = save(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "found"
    for criterion in ("magnitude", "wanda"):
        fields: dict[str, Any] = {"criterion": criterion, "calibration": text, "samples": 8, "length": 32}
        search(model, 0.5, allocator="uniform", output=out, overwrite=True, **fields)
        assert (
            json.loads((out / "model" / "billhook.json").read_text())["steps"][0]["made_by"]["criterion"] == criterion
        )


def test_gradients_are_computed_once_and_trials_use_them(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(
        "billhook.trials.trials.compute_gradients",
        lambda *a, **k: made.append(compute_gradients(*a, **k)) or made[-1],
    )
    monkeypatch.setattr("billhook.engine.loop.compute_gradients", None)
    model = llama()
    result = find(model, tokens, criterion="gblm", budget=3, finalists=2)
    assert len(made) == 1
    assert not made[0].path.exists()
    assert result.record["identity"]["proxy"] == "gblm"
    assert len(result.full) >= 2
    assert torch.equal(find_layers(model)[0].weight, find_layers(llama())[0].weight)


def test_uniform_wins_where_nothing_beats_it(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Run, "loss", lambda self, objective: 0.0 if self.candidate == UNIFORM else 1.0)
    result = find(llama(), tokens, budget=2)
    assert result.best.candidate == UNIFORM
    assert set(result.plan.sparsity.values()) == {0.5}


def test_split_is_disjoint_and_recorded(tokens: torch.Tensor):
    repeated = torch.cat([tokens, tokens[:5]])
    task = Task(Request(llama(), 0.5, calibration=repeated), ("atp",), "kl", False)
    calibration = torch.cat(task.split.batches)
    assert not {tuple(row) for row in calibration.tolist()} & {tuple(row) for row in task.split.heldout.tolist()}
    assert len(calibration) == len(task.split.heldout) == 6
    assert task.split.facts["heldout"] == {"windows": 6, "digest": digest(task.split.heldout)}
    assert task.split.facts["calibration"]["digest"] == digest(calibration)
    other = Task(Request(llama(), 0.5, calibration=repeated, seed=1), ("atp",), "kl", False)
    assert other.split.facts["heldout"] != task.split.facts["heldout"]


def test_same_inputs_same_bytes(tokens: torch.Tensor, tmp_path: Path):
    for name in ("a", "b"):
        find(llama(), tokens, output=tmp_path / name, budget=3)
    for file in ("search.json", "plan.json", "search.svg"):
        if (tmp_path / "a" / file).exists():
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / "plan.json").exists()


@pytest.mark.parametrize("runs", [1, 3, 7])
def test_resumed_equals_uninterrupted(runs: int, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    find(llama(), tokens, output=tmp_path / "whole", budget=5)
    written = 0
    original = Journal._write

    def dying(self: Journal) -> None:
        nonlocal written
        original(self)
        written += 1
        if written == runs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "_write", dying)
    model = llama()
    with pytest.raises(KeyboardInterrupt):
        find(model, tokens, output=tmp_path / "cut", budget=5)
    monkeypatch.setattr(Journal, "_write", original)
    assert torch.equal(find_layers(model)[0].weight, find_layers(llama())[0].weight)
    find(model, tokens, output=tmp_path / "cut", budget=5)
    for file in ("search.json", "plan.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_finished_search_makes_no_run_again(tokens: torch.Tensor, tmp_path: Path):
    lines: list[str] = []
    find(llama(), tokens, output=tmp_path / "out", budget=2)
    find(llama(), tokens, output=tmp_path / "out", budget=2, progress=lines.append)
    assert lines == []
    find(llama(), tokens, output=tmp_path / "out", budget=3, progress=lines.append)
    assert 1 <= len(lines) <= 2


def test_another_search_is_refused_with_the_reason(tokens: torch.Tensor, tmp_path: Path):
    find(llama(), tokens, output=tmp_path / "out", budget=1)
    before = (tmp_path / "out" / "search.json").read_bytes()
    for changes, reason in (
        ({"sparsity": 0.6}, "sparsity was 0.5"),
        ({"seed": 1}, "calibration"),
        ({"criterion": "magnitude"}, "criterion"),
    ):
        with pytest.raises(BillhookError, match=reason):
            find(llama(), tokens, output=tmp_path / "out", budget=1, **changes)
    with pytest.raises(BillhookError, match="model was"):
        find(llama(5), tokens, output=tmp_path / "out", budget=1)
    assert (tmp_path / "out" / "search.json").read_bytes() == before
    find(llama(), tokens, output=tmp_path / "out", budget=1, sparsity=0.6, overwrite=True)
    assert load_plan(tmp_path / "out" / "plan.json").target == 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget of zero finds nothing"),
        ({"budget": "0m"}, "budget of zero finds nothing"),
        ({"budget": "-3"}, "neither a number of trials"),
        ({"budget": "nan"}, "neither a number of trials"),
        ({"budget": 2.5}, "neither a number of trials"),
        ({"budget": "5 minutes"}, "such as 5m"),
        ({"allocator": "owl", "options": {"m": "-1"}}, "outlier_ratio"),
        ({"allocator": "sensitivity", "options": {"trial": "2"}}, "between 0 and 1"),
        ({"finalists": 0}, "at least one finalist"),
        ({"table": "table.json"}, "measures on its own half of the calibration windows: leave table out"),
        ({"gradients": "g.safetensors"}, "leave gradients out"),
        ({"rounding": "floor"}, "no use for rounding"),
        ({"sampling": "papers"}, "can overlap: leave sampling out"),
        ({"sampels": 3}, "Did you mean 'samples'"),
        ({"allocator": "alphaprunning"}, "Did you mean 'alphapruning'"),
        ({"objective": "loss"}, "kl, ppl"),
        ({"sparsity": None}, "how much"),
        ({"sparsity": 1.0}, "Sparsity"),
        ({"calibration": None}, "--calibration"),
        ({"calibration": torch.zeros(9, 8, dtype=torch.int64)}, "1 different windows are too few to split"),
        ({"criterion": "wonda"}, "Did you mean 'wanda'"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    changes: dict[str, Any], message: str, tokens: torch.Tensor, tmp_path: Path
):
    with pytest.raises(BillhookError, match=message):
        find(llama(), tokens, output=tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_folder_of_something_else_is_left_alone(tokens: torch.Tensor, tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(BillhookError, match="not empty"):
        find(llama(), tokens, output=tmp_path)
    (tmp_path / "search.json").write_text('{"version": 1}')
    with pytest.raises(BillhookError, match="not a search"):
        find(llama(), tokens, output=tmp_path)


def test_minutes_end_the_trials_but_allow_one(tokens: torch.Tensor):
    assert len(find(llama(), tokens, budget="0.000001m").trials) == 2


def test_differences_are_paired():
    a, b = (
        Run(Candidate("atp", {}), [1.0, 2.0], [0.0, 0.0], True),
        Run(UNIFORM, [0.5, 1.0, 9.0], [1.0, 1.0, 1.0], False),
    )
    assert loss_difference(a, b, "kl") == pytest.approx((0.75, 0.25))
    assert loss_difference(a, b, "nll") == pytest.approx((-1.0, 0.0))


# -- the command


def test_command_end_to_end(tmp_path: Path):
    model, text = save(tmp_path / "model"), text_file(tmp_path / "text.txt")
    arguments = [
        "search",
        str(model),
        "--sparsity=0.5",
        "--allocator=atp,alphapruning",
        f"--calibration={text}",
        "--samples=8",
        "--budget=3",
    ]
    arguments += ["--length=32", f"-o{tmp_path / 'found'}", "--json"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    assert result["trials"] == 4
    assert ran.stderr.count("trial ") == 4
    found = tmp_path / "found"
    assert result["model"] == str(found / "model")
    assert CliRunner().invoke(app, ["verify", str(found / "model")]).exit_code == 0
    plan = found / "plan.json"
    command = [
        "prune",
        str(model),
        f"--plan={plan}",
        f"--calibration={text}",
        "--samples=4",
        "--length=32",
        f"--output={tmp_path / 'pruned'}",
    ]
    assert CliRunner().invoke(app, command).exit_code == 0
    save_file({"tokens": torch.arange(96).view(3, 32)}, tmp_path / "tokens.safetensors")
    few = [*arguments[:4], f"--calibration={tmp_path / 'tokens.safetensors'}", "--length=32", f"-o{tmp_path / 'few'}"]
    ran = CliRunner().invoke(app, few)
    assert ran.exit_code != 0
    assert not (tmp_path / "few").exists()
