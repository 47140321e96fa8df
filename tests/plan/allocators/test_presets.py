"""Published settings by name: they exist, fit their allocators, and are what the papers say."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from billhook.cli import app
from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.allocators.presets import OWL_GRID, PRESETS, apply, preset
from billhook.plan.plan import load_plan
from billhook.plan.table import Row, Table


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


@pytest.mark.parametrize(
    "name, epsilon",
    [
        ("alphapruning/llama-7b@70", 0.2),
        ("alphapruning/llama-7b/magnitude@70", 0.3),
        ("alphapruning/llama-2-7b@70", 0.3),
        ("alphapruning/llama-2-7b/sparsegpt@70", 0.2),
        ("alphapruning/llama-2-7b/magnitude@70", 0.5),
        ("alphapruning/llama-7b@85", 0.1),
        ("alphapruning/llama-13b/magnitude@75", 0.45),
        ("alphapruning/llama-13b/sparsegpt@80", 0.2),
    ],
)
def test_epsilons_are_the_published_ones(name: str, epsilon: float) -> None:
    assert preset(name).options["epsilon"] == epsilon


def test_presets_of_owl_and_dlp_are_the_published_ones() -> None:
    assert dict(preset("owl/llama@70").options) == {"m": 5.0, "lam": 0.08}
    assert [preset(f"dlp@{s}").options["alpha"] for s in (50, 60, 70)] == [0.04, 0.1, 0.15]
    assert set(OWL_GRID) == set(ALLOCATORS.options("owl"))


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
