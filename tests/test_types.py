"""What type checkers know about the public functions."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import billhook
from billhook import _PUBLIC
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.steps.keywords import CompareFields, DrawnFields, MethodOptions, SearchFields
from billhook.steps.prune_job import PruneRequest


def test_type_checkers_see_every_public_name_where_it_is_imported_from() -> None:
    tree = ast.parse((ROOT / "billhook" / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == _PUBLIC


def test_the_keywords_of_prune_are_the_fields_of_a_request_with_their_defaults() -> None:
    parameters = dict(inspect.signature(billhook.prune).parameters)
    for name in ("progress", "methods"):
        del parameters[name]
    fields = inspect.signature(PruneRequest).parameters
    assert set(parameters) == set(fields)
    for name in set(fields) - {"model", "options"}:
        assert (parameters[name].default or "") == (fields[name].default or ""), name


def test_the_options_of_methods_are_those_of_the_built_in_ones() -> None:
    pairs = [(registry, name) for registry in (ALLOCATORS, CRITERIA) for name in registry.built_in]
    known = {option for registry, name in pairs for option in registry.options(name)}
    assert set(MethodOptions.__annotations__) == known - {"criterion"}  # which is a keyword of its own
    fields = set(PruneRequest.__dataclass_fields__)
    assert set(SearchFields.__annotations__) < fields
    assert set(DrawnFields.__annotations__) < set(CompareFields.__annotations__) <= fields


@pytest.mark.nightly
def test_a_checker_finds_misspelled_keywords_and_knows_results(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import billhook\n"
        "report = billhook.prune('model', sparsty=0.5)\n"
        "report = billhook.prune('model', sparsity=0.5, recipe='owl', lam=0.1, calibration='text.txt')\n"
        "found = billhook.search('model', 0.5, alocator='atp')\n"
        "reveal_type(report.sparsity)\n"
        "billhook.evaluate('model', 3)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
    errors = [line.split(":", 2)[1:] for line in said.splitlines() if "script.py" in line and "error" in line]
    assert {int(line) for line, _ in errors} == {2, 4, 6}, said
    assert 'Unexpected keyword argument "sparsty"' in said
    assert 'Revealed type is "float"' in said or 'Revealed type is "builtins.float"' in said
