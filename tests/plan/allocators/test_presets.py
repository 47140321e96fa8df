"""Published settings: defaults, presets and grids are what the papers say, and fit their allocators."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from billhook.cli import app
from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.allocators.atp import beta_grid
from billhook.plan.allocators.presets import OWL_GRID, PRESETS, apply, preset
from billhook.plan.plan import load_plan
from billhook.plan.table import Row, Table

BUILT_IN = [name for name in ALLOCATORS._built_in if name != "explicit"]  # which has a file and no default


@pytest.fixture
def table(tmp_path: Path) -> Path:
    metrics = {"alpha_peak": 2.0, "outlier_ratio:5": 1.0, "wanda_mean": 0.1}
    rows = [Row(f"blocks.{i}.w", i, "w", (8, 8), {k: v + i for k, v in metrics.items()}) for i in range(4)]
    Table(tuple(rows)).save(tmp_path / "table.json")
    return tmp_path / "table.json"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_legal_configuration(name: str, table: Path) -> None:
    found = preset(name)
    assert name.startswith(found.allocator)
    assert name.endswith(f"@{100 * found.sparsity:.0f}")
    assert ALLOCATORS.configure(found.allocator, found.options) == ALLOCATORS.configure(found.allocator, {}) | dict(
        found.options
    )
    assert (
        allocate(Table.load(table), found.sparsity, allocator=found.allocator, **found.options).target == found.sparsity
    )


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


def test_presets_are_the_published_settings() -> None:
    expected: dict[str, dict[str, object]] = {
        f"alphapruning/{model}@{per_cent}": {"metric": "alpha_peak", "epsilon": epsilon, "mapping": "block"}
        for model, epsilons in EPSILONS.items()
        for per_cent, epsilon in zip((70, 75, 80, 85), epsilons, strict=False)
    }
    expected["owl/llama@70"] = {"m": 5.0, "lam": 0.08}
    expected |= {f"dlp@{s}": {"alpha": alpha, "statistic": "mean"} for s, alpha in ((50, 0.04), (60, 0.1), (70, 0.15))}
    assert {name: dict(found.options) for name, found in PRESETS.items()} == expected


def test_defaults_are_the_published_ones() -> None:
    """Those of `global`, `sensitivity` and `curves` are ours."""
    assert {name: ALLOCATORS.configure(name, {}) for name in BUILT_IN} == {
        "uniform": {},
        "alphapruning": {"metric": "alpha_peak", "epsilon": 0.3, "mapping": "block"},
        "atp": {"beta": None},
        "owl": {"lam": 0.08, "m": 5.0},
        "dlp": {"alpha": 0.15, "statistic": "mean"},
        "er": {},
        "lamp": {},
        "global": {"score": "magnitude", "floor": 0.1},
        "sensitivity": {"epsilon": 0.2, "trial": 0.6},
        "curves": {"criterion": "admm", "strength": 1.0},
    }
    assert OWL_GRID == {"lam": (0.02, 0.05, 0.08, 0.1, 0.2), "m": (3.0, 5.0, 7.0, 10.0)}
    assert beta_grid(5, 0.99) == [0.002, 0.004]


def test_atp_uses_a_quarter_of_its_largest_beta() -> None:
    """Of five blocks at 60 %, the largest is 2 x 0.4 / 4."""
    table = Table(tuple(Row(f"blocks.{i}.w", i, "w", (8, 8)) for i in range(5)))
    sparsity = allocate(table, 0.6, allocator="atp").sparsity
    assert list(sparsity.values()) == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7], abs=1e-12)


def test_options_override_a_preset_and_contradictions_are_refused() -> None:
    assert apply("owl/llama@70", None, None, {}) == ("owl", 0.7, {"m": 5.0, "lam": 0.08})
    assert apply("owl/llama@70", "owl", 0.6, {"lam": "0.1"}) == ("owl", 0.6, {"m": 5.0, "lam": "0.1"})
    with pytest.raises(BillhookError, match="is for the allocator owl, not atp"):
        apply("owl/llama@70", "atp", None, {})
    with pytest.raises(
        BillhookError, match=r"Unknown preset 'alphapruning/llama-2-7b'.*Did you mean 'alphapruning/llama-2-7b@70'"
    ):
        preset("alphapruning/llama-2-7b")


def test_the_command_line_takes_and_lists_presets(table: Path) -> None:
    out = table.parent / "plan.json"
    result = CliRunner().invoke(app, ["plan", str(table), "--preset", "alphapruning/llama-2-7b@70", "-o", str(out)])
    assert result.exit_code == 0, result.output
    plan = load_plan(out)
    assert plan.target == 0.7
    assert plan.made_by["options"]["epsilon"] == 0.3
    assert plan.sparsity == allocate(Table.load(table), 0.7, allocator="alphapruning", epsilon=0.3).sparsity
    listed = CliRunner().invoke(app, ["ls", "presets", "--json"]).output
    assert all(f'"{name}"' in listed for name in PRESETS)
