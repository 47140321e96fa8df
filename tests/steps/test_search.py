"""Search: never worse than uniform; interruptions and reruns change nothing; mistakes are found first."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_families
from command import billhook
from safetensors.torch import save_file
from tiny import llama, mixtral, save, text_file
from typer.testing import CliRunner

from billhook import BillhookError, find_layers, load_plan, prune_, search
from billhook.cli import app
from billhook.engine.method import Method
from billhook.plan.allocators import ALLOCATORS
from billhook.racing.hyperparameters import RACED, Space
from billhook.racing.race import Race, Trial
from billhook.racing.record import SearchRecord
from billhook.steps.search import _loss
from billhook.tasks import TASKS
from billhook.tasks.base import Samples
from billhook.text.windows import digest
from billhook.trials.heldout import split_samples
from billhook.trials.trials import TrialRunner

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(258, (12, 32), generator=torch.Generator().manual_seed(1))


def split_of(tokens: torch.Tensor, seed: int = 0) -> Any:
    return split_samples(llama(), Samples({"input_ids": tokens}, "a test", digest(tokens), "given"), 4, seed)


def find(model: Any, tokens: torch.Tensor, **changes: Any) -> Any:
    return search(
        model, **({"sparsity": 0.5, "criterion": "wanda", "allocator": "atp", "calibration": tokens} | changes)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [({"beta": "0.1"}, r"leave out beta\."), ({"betta": "1"}, "betta"), ({"m": "many"}, "m='many'")],
)
def test_given_options_are_checked(given: dict[str, str], message: str, tokens: torch.Tensor):
    with pytest.raises(BillhookError, match=message):
        find(llama(), tokens, allocator=["atp", "owl"], options=given)


@pytest.mark.nightly
def test_several_allocators_are_searched_together(tokens: torch.Tensor):
    names = ("alphapruning", "owl", "dlp")  # ATP's grid is long where blocks are few
    found = find(llama(), tokens, allocator=names, grid=True, options={"m": 5})
    assert {trial.allocator for trial in found.trials} == {"uniform", *names}
    assert len(found.trials) == len(Space(names, {"m": 5}, 4, 0.5, True).first())
    assert len(find(llama(), tokens, budget=len(RACED), allocator=RACED).trials) == 1 + len(RACED)
    found = find(llama(), tokens, allocator="global,sensitivity", budget=2)
    assert [trial.allocator for trial in found.trials] == ["uniform", "global", "sensitivity"]
    assert find(llama(), tokens, allocator="er").trials[1].allocator == "er"


@pytest.mark.nightly
def test_all_means_every_allocator_that_needs_no_file(tokens: torch.Tensor):
    found = {trial.allocator for trial in find(llama(), tokens, allocator="all").trials}
    assert found == set(ALLOCATORS.names()) - {"explicit"}


def test_values_that_a_search_tries_are_short_numbers(tokens: torch.Tensor):
    found = find(llama(num_hidden_layers=11), tokens, budget=4, criterion="magnitude")
    values = [trial.options["beta"] for trial in found.trials[1:]]
    assert values == [0.04, 0.02, 0.07, 0.1]
    assert "0000000" not in json.dumps(found.record)


def test_a_search_has_the_criterion_of_the_recipe_and_chooses_the_allocation(tokens: torch.Tensor):
    found = find(llama(num_hidden_layers=2), tokens, criterion="", recipe="sparsegpt", budget=1)
    assert found.record["identity"]["criterion"] == "sparsegpt"
    with pytest.raises(BillhookError, match="A search chooses the allocation: give allocator owl, not the recipe"):
        find(llama(num_hidden_layers=2), tokens, criterion="", recipe="owl")
    assert len(find(llama(), tokens, allocator="uniform").trials) == 1


def test_auto_can_be_searched_with_other_allocators(tokens: torch.Tensor):
    found = find(llama(), tokens, allocator="auto,atp", budget=9)
    names = [trial.name for trial in found.trials]
    assert names[:2] == ["uniform", "curves"]
    assert len(found.trials) <= 10
    assert {trial.allocator for trial in found.trials} == {"uniform", "curves", "atp"}


def test_a_search_serves_patterns_and_experts(tokens: torch.Tensor):
    assert str(find(llama(), tokens, sparsity=None, pattern="4:8", budget=2).plan.pattern) == "4:8"
    model = mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find(model, tokens, criterion="sparsegpt", budget=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("objective", ["kl", pytest.param("ppl", marks=pytest.mark.nightly)])
def test_never_worse_than_uniform_and_a_trial_is_a_plain_run(objective: str, tokens: torch.Tensor):
    name = {"kl": "kl", "ppl": "nll"}[objective]
    for seed in range(3):
        found = find(llama(seed), tokens, objective=objective, seed=seed, budget=4)
        complete = [trial for trial in found.trials if not trial.dropped]
        assert complete[0].name == "uniform"
        assert found.best.loss(name) == min(trial.loss(name) for trial in complete)
    split, model = split_of(tokens, seed), llama(seed)
    with TrialRunner(model, find_layers(model), split.batches, split.heldout, Method("wanda", {})) as runner:
        prune_(model, found.plan, batches=split.batches)
        assert runner.losses(0, 6).kl == pytest.approx(found.best.kl, rel=1e-5)


def test_the_model_written_is_what_prune_makes_of_the_plan(tmp_path: Path):
    """Also where a search that had ended is asked for its model, which is not written twice."""
    model, text, out = save(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "found"
    fields: dict[str, Any] = {
        "criterion": "wanda",
        "allocator": "atp,owl",
        "calibration": text,
        "samples": 8,
        "length": 32,
        "budget": 4,
    }
    found = search(model, 0.5, output=out, save_model=False, **fields)
    assert found.model is None
    assert not (out / "model").exists()
    found = search(model, 0.5, output=out, **fields)
    assert found.model == out / "model"
    record = json.loads((out / "model" / "billhook.json").read_text())
    assert record["steps"][-1]["plan"] == json.loads((out / "plan.json").read_text())
    assert record["steps"][-1]["plan"]["made_by"]["racing"]["best"] == found.best.name
    command = ["prune", str(model), f"--plan={out / 'plan.json'}", f"--calibration={text}", "--samples=8"]
    command += ["--criterion=wanda", "--length=32", f"--output={tmp_path / 'pruned'}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    weights = [folder / "model.safetensors" for folder in (out / "model", tmp_path / "pruned")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    before = (out / "model" / "billhook.json").stat().st_mtime_ns
    search(model, 0.5, output=out, **fields)
    assert (out / "model" / "billhook.json").stat().st_mtime_ns == before


def test_the_model_of_another_search_is_replaced_though_its_plan_is_the_same(tmp_path: Path):
    model, text, out = save(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "found"
    for criterion in ("magnitude", "wanda"):
        fields: dict[str, Any] = {"criterion": criterion, "calibration": text, "samples": 8, "length": 32}
        search(model, 0.5, allocator="uniform", output=out, overwrite=True, **fields)
        record = json.loads((out / "model" / "billhook.json").read_text())
        assert record["steps"][-1]["made_by"]["criterion"] == criterion


def test_a_search_gives_the_same_bytes_again(tokens: torch.Tensor, tmp_path: Path):
    for name in ("a", "b"):
        find(llama(), tokens, output=tmp_path / name, budget=3, save_model=False)
    for file in ("search.json", "plan.json", "search.svg"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    picture = (tmp_path / "a" / "search.svg").read_text()
    assert picture.count("<title>") == 3
    assert picture.count("<circle") == 1  # around the best trial


@pytest.mark.parametrize("runs", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_resumed_equals_uninterrupted(runs: int, tokens: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fields: dict[str, Any] = {"allocator": "auto,atp", "budget": 5, "save_model": False}
    find(llama(), tokens, output=tmp_path / "whole", **fields)
    original, written = SearchRecord.write, iter(range(1, 100))

    def dying(self: SearchRecord, race: Race, **options: bool) -> Any:
        original(self, race, **options)
        if next(written) == runs:
            raise KeyboardInterrupt

    monkeypatch.setattr(SearchRecord, "write", dying)
    model = llama()
    with pytest.raises(KeyboardInterrupt):
        find(model, tokens, output=tmp_path / "cut", **fields)
    monkeypatch.setattr(SearchRecord, "write", original)
    assert torch.equal(find_layers(model)[0].weight, find_layers(llama())[0].weight)
    assert json.loads((tmp_path / "cut" / "search.json").read_text())["best"] is None
    lines: list[str] = []
    find(model, tokens, output=tmp_path / "cut", progress=lines.append, **fields)
    assert len(lines) == 1 + 6 - runs  # the first says how many there can be
    for file in ("search.json", "plan.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_finished_search_makes_no_trial_again(tokens: torch.Tensor, tmp_path: Path):
    lines: list[str] = []
    find(llama(), tokens, output=tmp_path / "out", budget=2)
    find(llama(), tokens, output=tmp_path / "out", budget=1, progress=lines.append)
    assert [line.partition(" ")[0] for line in lines] == ["At"]  # most so many trials, and none was made
    found = find(llama(), tokens, output=tmp_path / "out", budget=3, progress=lines.append)
    assert len(lines) == 3
    assert len(found.trials) == 4


def test_a_model_of_one_block_is_searched(tokens: torch.Tensor, tmp_path: Path):
    """Where a hyperparameter has only one value there is nothing to draw."""
    find(llama(num_hidden_layers=1), tokens, output=tmp_path / "out", allocator="atp", budget=1, save_model=False)
    assert load_plan(tmp_path / "out" / "plan.json").target == 0.5


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
        ({"finalists": 2}, "does not use 'finalists'"),
        ({"table": "table.json"}, "does not use 'table'"),
        ({"sampels": 3}, "Did you mean 'samples'"),
        ({"allocator": "alphaprunning"}, "Did you mean 'alphapruning'"),
        ({"objective": "loss"}, "kl, ppl"),
        ({"sparsity": None}, "how much"),
        ({"sparsity": 1.0}, "Sparsity"),
        ({"calibration": None}, "calibration="),
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


def test_a_folder_that_holds_no_search_is_left_alone(tokens: torch.Tensor, tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(BillhookError, match="not empty"):
        find(llama(), tokens, output=tmp_path, save_model=False)
    for damaged in ({"version": 1}, {"version": 2, "identity": {}, "trials": [{}]}):
        (tmp_path / "search.json").write_text(json.dumps(damaged))
        with pytest.raises(BillhookError, match=r"is not a search|is of another search|is damaged"):
            find(llama(), tokens, output=tmp_path, save_model=False)


def test_the_search_command_writes_a_verified_model(tmp_path: Path):
    model, text, found = save(tmp_path / "model"), text_file(tmp_path / "text.txt"), tmp_path / "found"
    arguments = ["search", str(model), "--sparsity=0.5", "--allocator=atp,alphapruning", f"--calibration={text}"]
    arguments += ["--samples=8", "--budget=3", "--length=32", f"-o{found}", "--json"]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    assert result["trials"] == 4
    assert ran.stderr.count("nll ") == 4
    assert result["model"] == str(found / "model")
    assert CliRunner().invoke(app, ["verify", str(found / "model")]).exit_code == 0
    assert "--finalists was removed. Use --budget" in billhook(*arguments, "--finalists=2").err
    save_file({"tokens": torch.arange(96).view(3, 32)}, tmp_path / "tokens.safetensors")
    few = [*arguments[:4], f"--calibration={tmp_path / 'tokens.safetensors'}", "--length=32", f"-o{tmp_path / 'few'}"]
    ran = CliRunner().invoke(app, few)
    assert ran.exit_code != 0
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text-generation", "KL divergence from the dense model 0.2500 nats a token, token perplexity 7.39"),
        ("image-classification", "KL divergence from the dense model 0.2500 nats an image"),
        ("text2text-generation", "KL divergence from the dense model 0.2500 nats a token of the answers"),
        ("feature-extraction", "cosine distance from the dense model 0.2500"),
    ],
)
def test_what_was_compared_is_said_in_the_words_of_the_task(name: str, words: str):
    assert _loss(TASKS.get(name), Trial("uniform", "uniform", {}, kl=[0.25], nll=[2.0])) == words


@pytest.mark.parametrize(
    ("model", "name", "unit"),
    [
        (llama, "KL divergence", "nats a token"),
        (lambda: vision_families.build("vit"), "KL divergence", "nats an image"),
        (vision_families.encoder, "cosine distance", ""),
    ],
)
def test_what_a_search_writes_and_draws_is_in_the_unit_of_the_task(model: Any, name: str, unit: str, tmp_path: Path):
    """Also in every line of progress. What has no labels has no likelihood of them."""
    data = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = unit == "nats a token"
    data = torch.randint(258, (8, 16), generator=torch.Generator().manual_seed(0)) if text else data
    lines: list[str] = []
    find(model(), data, criterion="magnitude", budget=1, output=tmp_path, save_model=False, progress=lines.append)
    best = json.loads((tmp_path / "search.json").read_text())["best"]
    assert ("token_ppl" in best) == text
    drawn = (tmp_path / "search.svg").read_text()
    assert (f"{name}, {unit}" if unit else name) in drawn
    assert drawn.count("nats a") == bool(unit)
    assert f"{'kl' if unit else name} {best['mean_kl']:.4f}" in "\n".join(lines)
    if not text:
        with pytest.raises(BillhookError, match="The objective ppl needs labels"):
            find(model(), data, criterion="magnitude", objective="ppl")
