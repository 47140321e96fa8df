"""The shape of the code: imports form a DAG, also between packages, light stays light, and size budgets hold."""

import ast
import graphlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreter import HEAVY, in_new_interpreter

import billhook
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.metrics import CURVES
from billhook.plan.table import Row, Table

ROOT = Path(billhook.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
PACKAGES = [name for name, path in FILES.items() if path.name == "__init__.py"]
LIGHT = [
    *PACKAGES,
    *(name for name in sorted(FILES) if name.startswith(("billhook.plan.", "billhook.cli."))),
    *(f"billhook.{name}" for name in ("errors", "registry", "store.files", "distributed.torchrun", "reports.charts")),
    *(f"billhook.text.{name}" for name in ("stdlib", "hub", "corpus")),
]
COMMANDS = ("prune", "measure", "plan", "eval", "verify", "pack", "unpack", "generate", "bench", "ls", "demo")

# Modules that a command may load to show its help or make a plan: about 370 today, most of them the standard library's
# and pydantic's. torch alone loads more than 1,000. Unlike seconds, this is the same on every machine;
# benchmarks/startup.py measures the seconds.
LIGHT_MODULES = 420
LINES_A_FILE, LINES_A_FUNCTION, POSITIONAL = 300, 40, 6

_COMMAND = """
from billhook.cli import main
sys.argv[0] = "billhook"
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
report(code)
"""
_COMMANDS = """
from billhook.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["billhook", *command]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 0, command
report(0)
"""


def imported(module: str) -> Iterator[str]:
    """The modules of the package that `module` imports or names in a string, inside functions too; `billhook` itself
    imports others for type checkers only."""
    if module == "billhook":
        return
    for node in ast.walk(TREES[module]):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            place = re.fullmatch(r"(billhook(?:\.\w+)+)(?::\w+)?", node.value)  # as registries name their methods
            names = [place[1]] if place else []
        for name in names:
            while name and name not in FILES:
                name = name.rpartition(".")[0]
            if name and name != module:
                yield name


def test_imports_form_a_dag():
    graphlib.TopologicalSorter(
        {module: set(imported(module)) - {"billhook"} for module in FILES}
    ).prepare()  # raises CycleError with the cycle


def test_packages_import_only_from_those_above_them_in_the_table_of_the_architecture():
    """`docs/ARCHITECTURE.md` has one row for each package and for each module beside the packages, in import order."""
    page = (ROOT.parent / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = page.partition("\n## The packages\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    there = {name.split(".")[1] for name in FILES if name not in ("billhook", "billhook.__main__")}
    assert sorted(rows) == sorted(there)
    height = {"billhook": -1, "billhook.__main__": len(rows)}
    height |= {f"billhook.{name}": place for place, name in enumerate(rows)}
    for module in FILES:
        for other in imported(module):
            here, there = (".".join(name.split(".")[:2]) for name in (module, other))
            assert here == there or height[there] < height[here], f"{module} imports {other}"


def test_packages_without_code_have_a_short_docstring():
    """Those whose `__init__.py` is a docstring alone, three lines of text at most; importing a module of theirs loads
    nothing else."""
    plain = [name for name in PACKAGES if len(TREES[name].body) == 1]
    assert sorted(set(PACKAGES) - set(plain)) == [
        "billhook",
        "billhook.cli",
        "billhook.measurement",
        "billhook.methods.quantize",
        "billhook.methods.sparse",
        "billhook.methods.structured",
        "billhook.plan.allocators",
        "billhook.plan.level_allocators",
        "billhook.recovery.objectives",
        "billhook.tasks",
    ]
    for name in plain:
        assert 1 <= len([line for line in (ast.get_docstring(TREES[name]) or "").splitlines() if line]) <= 3, name


def test_light_modules_load_no_torch():
    report = in_new_interpreter(f"import importlib\nfor name in {LIGHT}: importlib.import_module(name)\nreport(0)")
    assert not HEAVY & set(report["loaded"])


def test_light_public_names_load_no_torch():
    names = [
        "ALLOCATORS",
        "BillhookError",
        "CRITERIA",
        "JobError",
        "METRICS",
        "Pattern",
        "Plan",
        "Spec",
        "Table",
        "allocate",
        "load_plan",
    ]
    report = in_new_interpreter(
        f"import billhook\nfor name in {names}: getattr(billhook, name)\nbillhook.CRITERIA.names()\nreport(0)"
    )
    assert not HEAVY & set(report["loaded"])


def test_every_public_name_is_there():
    assert set(billhook.__all__) == set(dir(billhook))
    for name in billhook.__all__:
        assert getattr(billhook, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = billhook.nothing
    with pytest.raises(AttributeError, match=r"billhook\.SparsityPlan was removed: use billhook\.Plan\."):
        _ = billhook.SparsityPlan


def test_help_is_light():
    """All commands together load no more than a single one may."""
    report = in_new_interpreter(
        _COMMANDS, json.dumps([["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
    )
    assert report["code"] == 0, report["errors"]
    assert not HEAVY & set(report["loaded"])
    assert report["modules"] <= LIGHT_MODULES


def test_planning_is_light(tmp_path: Path):
    """All allocators together load no more than a single one may."""
    needs = {column for name in ALLOCATORS.names() for column in ALLOCATORS.needs(name, ALLOCATORS.configure(name, {}))}
    curves = [name for name in needs if name.partition(":")[0] in CURVES]
    numbers = [name for name in needs if name not in curves]
    rows = [
        Row(f"blocks.{i}.w", i, "w", (8, 8), dict.fromkeys(numbers, 1.0 + i), dict.fromkeys(curves, (0.0, 1.0 + i)))
        for i in range(4)
    ]
    Table(tuple(rows)).save(tmp_path / "table.json")
    plans = {name: tmp_path / f"{name}.json" for name in ALLOCATORS.names()}
    commands = [
        ["plan", str(tmp_path / "table.json"), f"--allocator={name}", "--sparsity=0.5", f"-o{path}"]
        for name, path in plans.items()
    ]
    report = in_new_interpreter(_COMMANDS, json.dumps(commands))
    assert report["code"] == 0, report["errors"]
    assert {billhook.load_plan(path).target for path in plans.values()} == {0.5}
    assert not HEAVY & set(report["loaded"])
    assert report["modules"] <= LIGHT_MODULES


@pytest.mark.parametrize("kind", ["allocators", "metrics"])
def test_listing_is_light(kind: str):
    report = in_new_interpreter(_COMMAND, "ls", kind)
    assert report["code"] == 0, report["errors"]
    assert not HEAVY & set(report["loaded"])
    assert report["modules"] <= LIGHT_MODULES


@pytest.mark.parametrize("module", sorted(FILES))
def test_size_budgets_and_docstrings(module: str):
    assert ast.get_docstring(TREES[module]), f"{module} has no docstring"
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LINES_A_FILE
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
        assert lines <= LINES_A_FUNCTION, f"{module}.{node.name} has {lines} lines"
        assert len(node.args.posonlyargs + node.args.args) <= POSITIONAL or _is_kernel(node), f"{module}.{node.name}"


def _is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton's functions take no keyword-only parameters."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
