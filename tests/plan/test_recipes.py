"""Recipes: ours and the published ones are what they say, single options override them, and commands know them."""

from pathlib import Path

import pytest
import tiny
import torch
from command import billhook, done

import billhook as api
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO, allocate
from billhook.plan.plan import load_plan
from billhook.plan.recipes import RECIPES, chosen, recipe
from billhook.plan.table import Row, Table
from billhook.racing.hyperparameters import OWL_GRID, configure
from billhook.steps.prune_job import PruneRequest

IDS = torch.randint(0, 256, (8, 24), generator=torch.Generator().manual_seed(0))

ALPHAPRUNING = {"metric": "alpha_peak", "epsilon": 0.3, "mapping": "block"}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    metrics = {"alpha_peak": 2.0, "alpha_mid": 2.0, "outlier_ratio:5": 1.0, "wanda_mean": 0.1}
    rows = [Row(f"blocks.{i}.w", i, "w", (8, 8), {k: v + i for k, v in metrics.items()}) for i in range(4)]
    Table(tuple(rows)).save(tmp_path / "table.json")
    return tmp_path / "table.json"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_legal_configuration(name: str, table: Path) -> None:
    found = recipe(name)
    CRITERIA.check(found.criterion)
    assert "@" not in name or name.endswith(f"@{100 * (found.sparsity or 0):.0f}")
    if found.allocator == AUTO:
        return
    assert configure(found.allocator, found.options) == ALLOCATORS.configure(found.allocator, {}) | dict(found.options)
    if AUTO not in found.options.values():
        assert allocate(Table.load(table), 0.5, allocator=found.allocator, **found.options).target == 0.5


@pytest.mark.parametrize(
    "name, parts",
    [
        ("fast", ("wanda", "uniform", {}, "none")),
        ("good", ("admm", "auto", {}, "none")),
        ("best", ("admm", "auto", {}, "blocks")),
        ("wanda", ("wanda", "uniform", {}, "none")),
        ("sparsegpt", ("sparsegpt", "uniform", {}, "none")),
        ("gblm", ("gblm", "uniform", {}, "none")),
        ("alphapruning", ("wanda", "alphapruning", ALPHAPRUNING, "none")),
        ("atp", ("wanda", "atp", {"beta": "auto"}, "none")),
        ("owl", ("wanda", "owl", {"m": 5.0, "lam": 0.08}, "none")),
    ],
)  # fmt: skip
def test_a_recipe_without_a_sparsity_is_the_pair_of_its_name(name: str, parts: tuple[object, ...]) -> None:
    found = PruneRequest("model", 0.5, recipe=name)
    assert (found.criterion, found.allocator, found.options, found.refine) == parts
    assert found.followed == name


EPSILONS = {  # model and criterion: epsilon of AlphaPruning at 70 %, and at 75, 80 and 85 % in FARMS' scripts
    "llama-7b": (0.2, 0.2, 0.2, 0.1),
    "llama-7b/magnitude": (0.3, 0.3, 0.2, 0.15),
    "llama-7b/sparsegpt": (0.2, 0.2, 0.1, 0.15),
    "llama-13b": (0.3, 0.3, 0.3, 0.2),
    "llama-13b/magnitude": (0.5, 0.45, 0.3, 0.15),
    "llama-13b/sparsegpt": (0.3, 0.3, 0.2, 0.2),
    "llama-30b": (0.3,),
    "llama-30b/magnitude": (0.4,),
    "llama-30b/sparsegpt": (0.3,),
    "llama-65b": (0.3,),
    "llama-65b/magnitude": (0.4,),
    "llama-65b/sparsegpt": (0.3,),
    "llama-2-7b": (0.3,),
    "llama-2-7b/magnitude": (0.5,),
    "llama-2-7b/sparsegpt": (0.2,),
    "llama-2-13b": (0.3,),
    "llama-2-13b/magnitude": (0.4,),
    "llama-2-13b/sparsegpt": (0.3,),
    "llama-2-70b": (0.3,),
    "llama-2-70b/magnitude": (0.4,),
    "llama-2-70b/sparsegpt": (0.3,),
}


@pytest.mark.parametrize("model", EPSILONS)
def test_epsilons_are_the_published_ones(model: str) -> None:
    criterion = model.partition("/")[2] or "wanda"
    for per_cent, epsilon in zip((70, 75, 80, 85), EPSILONS[model], strict=False):
        found = PruneRequest("model", recipe=f"alphapruning/{model}@{per_cent}")
        assert found.options == ALPHAPRUNING | {"epsilon": epsilon}
        assert (found.criterion, found.sparsity) == (criterion, per_cent / 100)


def test_recipes_with_a_sparsity_are_those_that_were_published() -> None:
    of_models = {f"alphapruning/{m}@{s}" for m in EPSILONS for s in (70, 75, 80, 85)[: len(EPSILONS[m])]}
    assert {name for name in RECIPES if "@" in name} - of_models == {
        *("alphapruning@70", "owl@70", "dlp@50", "dlp@60", "dlp@70")
    }
    assert of_models <= set(RECIPES)
    assert dict(recipe("alphapruning@70").options) == ALPHAPRUNING
    assert dict(recipe("owl@70").options) == {"m": 5.0, "lam": 0.08}
    for per_cent, alpha in ((50, 0.04), (60, 0.1), (70, 0.15)):
        assert dict(recipe(f"dlp@{per_cent}").options) == {"alpha": alpha, "statistic": "mean"}
    assert OWL_GRID == {"lam": (0.02, 0.05, 0.08, 0.1, 0.2), "m": (3.0, 5.0, 7.0, 10.0)}


def test_good_is_the_default_and_single_options_override() -> None:
    def parts(**given: object) -> tuple[object, ...]:
        found = PruneRequest("model", 0.6, **given)  # type: ignore[arg-type]
        return found.criterion, found.allocator, found.refine, found.followed

    assert parts() == ("admm", "auto", "none", "good")
    assert parts(refine="blocks") == ("admm", "auto", "blocks", None)
    assert parts(recipe="good", criterion="wanda") == ("wanda", "auto", "none", None)
    assert parts(allocator="owl") == ("admm", "owl", "none", None)
    assert parts(recipe="owl", criterion="sparsegpt") == ("sparsegpt", "owl", "none", None)
    assert parts(recipe="owl", options={"lam": 0.1})[-1] is None
    assert PruneRequest("model", 0.6, recipe="owl", options={"lam": 0.1}).options == {"m": 5.0, "lam": 0.1}
    assert PruneRequest("model", 0.6, recipe="owl@70").sparsity == 0.6
    assert PruneRequest("model", 0.6, recipe="owl@70").followed is None


def test_a_criterion_without_a_recipe_is_used_with_the_uniform_allocation() -> None:
    assert PruneRequest("model", 0.5, criterion="magnitude").allocator == "uniform"
    assert PruneRequest("model", 0.5, criterion="wanda", allocator="owl").allocator == "owl"


def test_an_nm_pattern_is_uniform_and_an_allocation_by_recipe_is_refused() -> None:
    for name in ("good", "best", "fast", "sparsegpt"):
        assert PruneRequest("model", pattern="2:4", recipe=name).allocator == "uniform"
        assert PruneRequest("model", pattern="2:4", recipe=name).followed == name
    with pytest.raises(BillhookError, match='an N:M pattern all the same: use recipe="wanda", or allocator="owl"'):
        PruneRequest("model", pattern="2:4", recipe="owl")
    assert PruneRequest("model", pattern="4:8", recipe="owl", allocator="owl").options == {"m": 5.0, "lam": 0.08}


def test_a_plan_takes_the_criterion_of_the_recipe_and_refuses_an_allocation(tmp_path: Path) -> None:
    assert chosen("best", "", "", "", planned=True).refine == "blocks"
    with pytest.raises(BillhookError, match="leave out the plan, or recipe owl"):
        PruneRequest("model", recipe="owl", plan=tmp_path / "plan.json")


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        BillhookError, match=r"Unknown recipe 'alphapruning/llama-2-7b'.*Did you mean 'alphapruning/llama-2-7b@70'"
    ):
        recipe("alphapruning/llama-2-7b")


def test_plan_and_ls_know_recipes(table: Path) -> None:
    out = table.parent / "plan.json"
    done("plan", table, "--recipe", "alphapruning/llama-2-7b@70", "-o", out)
    plan = load_plan(out)
    assert plan.target == 0.7
    assert plan.sparsity == allocate(Table.load(table), 0.7, allocator="alphapruning", epsilon=0.3).sparsity
    assert {row["name"] for row in done("ls", "recipes", "--json").json["recipes"]} == set(RECIPES)
    assert "Say how to allocate: --allocator NAME or --recipe NAME" in billhook("plan", table, "--sparsity", "0.5").err


@pytest.mark.gate
def test_the_record_names_the_recipe_that_was_followed() -> None:
    def recorded(**fields: object) -> object:
        report = api.prune(tiny.llama(num_hidden_layers=2), sparsity=0.6, calibration=IDS, **fields)
        return report.record["steps"][0]["made_by"]["recipe"]

    assert recorded() == "good"
    assert recorded(recipe="fast") == "fast"
    assert recorded(criterion="wanda") is None


def test_without_text_the_error_offers_the_models_own() -> None:
    with pytest.raises(BillhookError, match=r"the recipe good.*needs activations.*self:.*is better"):
        api.prune(tiny.llama(num_hidden_layers=2), sparsity=0.6)
