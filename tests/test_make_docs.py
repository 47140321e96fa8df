"""The generator of docs/cli.md and docs/methods_table.md: complete, in step with --help, and it notices stale pages."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from billhook.architectures.layers import FAMILIES
from billhook.cli import app
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.metrics import FACTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "tools" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_in_the_repository_are_up_to_date(make_docs: ModuleType) -> None:
    assert make_docs.main(["--check"]) == 0, "run make docs"


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_option_of_the_help_is_documented_and_no_other(make_docs: ModuleType, command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    section = make_docs.command_line().split(f"## billhook {command}\n")[1].split("\n## ")[0]
    options = re.compile(r"--[a-z][a-z-]*")
    documented = {
        name for line in section.splitlines() if line.startswith("| `-") for name in options.findall(line.split("|")[1])
    }
    printed = {
        name for line in shown.splitlines() for name in options.findall(line[:60]) if line.lstrip().startswith("-")
    }
    assert documented == printed - {"--help"}


def test_every_command_has_examples_that_name_it(make_docs: ModuleType) -> None:
    for command in app.registered_commands:
        section = make_docs.command_line().split(f"## billhook {command.name}\n")[1].split("\n## ")[0]
        assert f"\nbillhook {command.name}" in section.split("```sh")[1]


def test_every_method_metric_and_family_is_listed(make_docs: ModuleType) -> None:
    page = make_docs.methods()
    for name in [*ALLOCATORS.names(), *CRITERIA.names(), *FACTS]:
        assert f"| `{name}` |" in page
    assert all(f"`{family}`" in page for family in FAMILIES)
    assert "`epsilon=0.3`" in page
    assert all(
        f"`{name}`" in page
        for name in ("alpha_peak:repaired", "outlier_ratio:M", "block_loss:SPARSITY", "lamp_quantiles")
    )


def test_check_names_what_is_stale_and_writing_repairs_it(
    make_docs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_docs.main(["--check"], docs=tmp_path) == 1
    assert make_docs.main([], docs=tmp_path) == 0
    assert make_docs.main(["--check"], docs=tmp_path) == 0
    (tmp_path / "cli.md").write_text("old", encoding="utf-8")
    capsys.readouterr()
    assert make_docs.main(["--check"], docs=tmp_path) == 1
    assert "cli.md" in (told := capsys.readouterr().err)
    assert "methods_table.md" not in told
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == "old"


def test_other_arguments_are_refused(make_docs: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_docs.main(["--chek"]) == 2
    assert "--check" in capsys.readouterr().err


def test_bars_in_cells_do_not_break_a_table(make_docs: ModuleType) -> None:
    assert make_docs.table(["a"], [["|W|"]]) == "| a |\n| --- |\n| \\|W\\| |"
