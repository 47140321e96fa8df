"""The generated pages are complete, in step with --help and the registries, and up to date in the repository."""

import ast
import functools
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path

import command_page
import field_tables
import make_docs
import method_pages
import page_parts
import pytest
from typer.testing import CliRunner

from billhook.architectures.families import FAMILIES
from billhook.cli import app
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.metrics import CURVES, FACTS
from billhook.registry import Registry

read_pages = functools.cache(method_pages.pages)
METHODS = [(registry, name) for registry in (ALLOCATORS, CRITERIA) for name in registry.names()]


def test_pages_in_the_repository_are_up_to_date() -> None:
    assert make_docs.main(["--check"]) == 0, "run make docs"


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_the_documented_options_are_those_of_the_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    section = command_page.page().split(f"## billhook {command}\n")[1].split("\n## ")[0]
    options = re.compile(r"--[a-z][a-z-]*")
    lines = shown.split("\nOptions:\n")[1].splitlines()  # a description before them may name an option, too
    documented = {
        name for line in section.splitlines() if line.startswith("| `-") for name in options.findall(line.split("|")[1])
    }
    first = (re.split(r"\s{2,}", line.strip())[0] for line in lines if line.lstrip().startswith("-"))
    printed = {name for column in first for name in options.findall(column)}
    assert documented == printed - {"--help"}


def test_every_command_has_examples_that_name_it() -> None:
    for command in app.registered_commands:
        section = command_page.page().split(f"## billhook {command.name}\n")[1].split("\n## ")[0]
        assert f"\nbillhook {command.name}" in section.split("```sh")[1]


def test_every_method_metric_and_family_is_in_the_index() -> None:
    page = read_pages()["index.md"]
    for name in [*ALLOCATORS.names(), *CRITERIA.names(), *FACTS, *CURVES]:
        assert f"| [`{name}`](" in page
    assert all(f"`{family}`" in page for families in FAMILIES.values() for family in families)
    assert "`epsilon=0.3`" in page
    assert all(f"`{name}`" in page for name in ("alpha_peak:repaired", "outlier_ratio:M", "block_loss:SPARSITY"))


@pytest.mark.parametrize("registry, name", METHODS, ids=lambda part: part if isinstance(part, str) else part.kind)
def test_the_docstring_of_a_method_is_a_short_page_with_a_formula(registry: Registry, name: str) -> None:
    module = inspect.getmodule(registry.get(name))
    assert module is not None
    text = ast.get_docstring(ast.parse(inspect.getsource(module))) or ""
    assert re.match(r"[A-Z][^:\n]{2,30}: \w.*\.\n", text), "begins with 'Title: summary.' on one line"
    assert len(text.splitlines()) <= 40
    assert re.search(r"^    \S", text, re.MULTILINE), "has no formula, indented by four spaces"
    page = read_pages()[f"{name}.md"]
    assert all(f"| `{option}` |" in page for option in registry.options(name))


def test_pages_link_to_papers_and_to_each_other_but_not_to_themselves() -> None:
    pages = read_pages()
    assert "[arXiv:2310.05175](https://arxiv.org/abs/2310.05175)" in pages["owl.md"]
    assert "[`alpha_farms`](farms.md)" in pages["alphapruning.md"]
    assert "(alphapruning.md)" not in pages["alphapruning.md"]
    assert "**Differences from the published code:**" in pages["owl.md"]


def test_check_names_what_is_stale_and_writing_repairs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_docs.main(["--check"], docs=tmp_path) == 1
    assert make_docs.main([], docs=tmp_path) == 0
    assert make_docs.main(["--check"], docs=tmp_path) == 0
    (tmp_path / "cli.md").write_text("old", encoding="utf-8")
    capsys.readouterr()
    assert make_docs.main(["--check"], docs=tmp_path) == 1
    assert "cli.md" in (told := capsys.readouterr().err)
    assert "index.md" not in told
    assert (tmp_path / "cli.md").read_text(encoding="utf-8") == "old"


@pytest.mark.nightly
def test_pages_of_methods_that_are_gone_are_stale_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_docs.main([], docs=tmp_path) == 0
    (gone := tmp_path / "methods" / "gone.md").write_text("old", encoding="utf-8")
    assert make_docs.main(["--check"], docs=tmp_path) == 1
    assert "gone.md" in capsys.readouterr().err
    assert make_docs.main([], docs=tmp_path) == 0
    assert not gone.exists()


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_docs.main(["--chek"]) == 2
    assert "--check" in capsys.readouterr().err


def test_bars_in_cells_do_not_break_a_table() -> None:
    assert page_parts.table(["a"], [["|W|"]]) == "| a |\n| --- |\n| \\|W\\| |"


@dataclass
class Inner:
    """An entry.

    * `size`: bytes.
    """

    size: int


@dataclass
class Outer:
    """An example.

    * `version` (integer): 3.
    * `name`: what it is called;
      on two lines.
    * `score`: may be missing.
    * `entries`: replaced by the rows of their own class.
    * `extra.*` (any, optional): a path.
    """

    name: str
    score: float | None = None
    entries: list[Inner] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)


def test_field_tables_come_from_the_bullets_of_dataclasses() -> None:
    parts = [field_tables.Part("", f"{__name__}:Outer"), field_tables.Part("entries[].", f"{__name__}:Inner")]
    assert field_tables.rows(parts) == [
        ["`version`", "integer", "3."],
        ["`name`", "string", "what it is called; on two lines."],
        ["`score`", "number or null", "may be missing."],
        ["`extra.*`", "any, optional", "a path."],
        ["`entries[].size`", "integer", "bytes."],
    ]
    mark = f"<!-- fields: x = entries[]. {__name__}:Inner? -->"
    made = field_tables.filled(f"text\n\n{mark}\n| old |\n\nmore\n")
    assert made == (
        f"text\n\n{mark}\n| field | type | meaning |\n| --- | --- | --- |\n"
        "| `entries[].size` | integer, optional | bytes. |\n\nmore\n"
    )
    by_hand = "<!-- fields: y -->\n| by hand |\n"
    assert field_tables.filled(by_hand) == by_hand


def test_a_field_without_a_bullet_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inner, "__doc__", "Nothing.")
    with pytest.raises(AssertionError, match="does not document size"):
        field_tables.fields(f"{__name__}:Inner")
