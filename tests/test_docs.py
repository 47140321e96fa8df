"""The documentation is correct: formats are those of real files, examples run, links resolve. See also test_pages.

A JSON block after `<!-- format: NAME -->` is read by the tool. A table after `<!-- fields: NAME -->` lists exactly the
fields of a real NAME.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import billhook
import billhook.engine.gradient_file
from billhook import Plan, Table, load_plan
from billhook.cli import app
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.spec import Pattern
from billhook.plan.table import Row
from billhook.steps.verify import verify

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "billhook" / "demo_model"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FORMATS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "formats").glob("*.md"))}


def blocks(page: Path, mark: str) -> list[str]:
    """The fenced blocks that stand behind a mark such as `run: sh`, without a common indentation."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"^( *)<!-- {re.escape(mark)} -->\n+ *```\w+\n(.*?)\n *```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


@pytest.fixture
def playground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "billhook").mkdir()
    (tmp_path / "billhook" / "demo_model").symlink_to(MODEL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(example: Path, playground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_say_what_they_show(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) < 40


def test_a_sweep_loads_no_torch() -> None:
    code = (
        "import sys, tempfile, pathlib, runpy\n"
        "names = runpy.run_path(sys.argv[1])\n"
        "from billhook.plan.table import Row, Table\n"
        "table = Table(tuple(Row(f'l{i}', i, 'q', (8, 8), {'alpha_peak': 2.0 + i}) for i in range(3)))\n"
        "assert len(names['sweep'](table, 0.5, pathlib.Path(tempfile.mkdtemp()))) == 5\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "examples" / "sweep_allocations.py")], check=True, capture_output=True
    )


def test_the_task_of_the_guide_scores_one_token_of_a_window() -> None:
    import tiny
    import torch

    (code,) = blocks(ROOT / "docs" / "add_a_method.md", "run: task")
    names: dict[str, Any] = {"__name__": "last_token"}
    exec(compile(code, "last_token.py", "exec"), names)
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    found = billhook.evaluate(tiny.llama(), ids, scoring=names["TASK"])
    assert (found.tokens, found.protocol) == (3, "perplexity of the last token of each window")


def test_the_sink_of_the_guide_writes_all_weights(tmp_path: Path) -> None:
    import tiny
    from safetensors.torch import load_file

    (code,) = blocks(ROOT / "docs" / "add_a_method.md", "run: sink")
    names: dict[str, Any] = {"__name__": "one_file"}
    exec(compile(code, "one_file.py", "exec"), names)
    model = tiny.llama()
    names["OneFile"](model).write_all(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(written[name].equal(model.state_dict()[name]) for name in written)
    assert len(written) >= len(list(model.parameters())) - 1


def test_the_methods_of_the_guide_are_short_pages(tmp_path: Path) -> None:
    for mark in ("allocator", "criterion"):
        (code,) = blocks(ROOT / "docs" / "add_a_method.md", f"run: {mark}")
        assert re.match(r'"""[A-Z]\w+: .*\.\n', code)


@pytest.mark.slow
def test_the_plugin_of_the_guide_is_found_once_it_is_installed(playground: Path) -> None:
    guide = ROOT / "docs" / "add_a_method.md"
    (module,), (project,), (commands,) = (
        blocks(guide, mark) for mark in ("run: allocator", "run: plugin", "run: with the plugin")
    )
    facts = tomllib.loads(project)
    (declared,) = facts["project"]["entry-points"].items()
    installed = playground / "billhook_depth-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {facts['project']['name']}\nVersion: 1.0\n")
    points = [f"{name} = {place}" for name, place in declared[1].items()]
    (installed / "entry_points.txt").write_text("\n".join([f"[{declared[0]}]", *points]) + "\n")
    (playground / f"{facts['tool']['setuptools']['py-modules'][0]}.py").write_text(module, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(playground), str(ROOT)])}
    for line in commands.splitlines():
        command = [sys.executable, "-m", *shlex.split(line)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    record = json.loads((playground / "pruned" / "billhook.json").read_text(encoding="utf-8"))
    assert record["steps"][0]["plan"]["made_by"]["options"] == {"power": 0.3}


def test_the_allocator_of_the_guide_keeps_its_budget() -> None:
    (code,) = blocks(ROOT / "docs" / "add_a_method.md", "run: allocator")
    names: dict[str, Any] = {"__name__": "depth"}
    exec(compile(code, "depth.py", "exec"), names)
    table = Table(tuple(Row(f"l{i}", i, "q", (8, 8 * (1 + i)), {}) for i in range(4)))
    for target in (0.0, 0.5, 0.9):
        shares = names["depth"](table, target, power=0.5)
        assert sum(shares[row.layer] * row.n for row in table) == pytest.approx(target * table.total)
    with pytest.raises(billhook.BillhookError, match="power"):
        names["depth"](table, 0.5, power=-1.0)


def test_the_criterion_of_the_guide_removes_what_is_asked() -> None:
    import torch

    from billhook.methods.masks import Select
    from billhook.methods.statistics import LayerStats

    (code,) = blocks(ROOT / "docs" / "add_a_method.md", "run: criterion")
    names: dict[str, Any] = {"__name__": "squares"}
    exec(compile(code, "squares.py", "exec"), names)
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    pruned = names["squares"](W, LayerStats(9, 1, torch.arange(1.0, 9.0)), Select((4, 8), 0.5, 16))
    assert int((pruned == 0).sum()) == 16


def example_of(name: str, path: Path) -> Path:
    (code,) = [code for page in FORMATS for code in blocks(page, f"format: {name}")]
    path.write_text(code, encoding="utf-8")
    return path


def test_json_examples_are_read_by_the_tool(tmp_path: Path) -> None:
    table = Table.load(example_of("table.json", tmp_path / "table.json"))
    assert table.columns() == ["alpha_peak", "outlier_ratio:5"]
    assert allocate(table, 0.5, allocator="owl").target == 0.5
    plan = load_plan(example_of("plan.json", tmp_path / "plan.json"))
    assert plan.pattern == Pattern()
    assert plan.made_by["allocator"] in ALLOCATORS.names()
    example_of("billhook.json", tmp_path / "billhook.json")
    problems = verify(tmp_path).problems  # a record without its model: well formed, and nothing is where it says
    assert all("missing" in p or "cannot be loaded" in p or "no safetensors" in p for p in problems), problems
    place = json.loads(example_of("place", tmp_path / "place.json").read_text(encoding="utf-8"))
    for key in ("tensor", "index", "transposed", "rows"):
        assert all(key in piece for piece in place["pieces"])


def test_a_minimal_plan_by_hand_is_enough(tmp_path: Path) -> None:
    plan = {"version": 1, "target": 0.5, "pattern": "2:4", "sparsity": {"a": 0.5}}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert load_plan(tmp_path / "plan.json") == Plan.of_sparsities(0.5, Pattern(2, 4), {"a": 0.5})


def fields(name: str) -> dict[tuple[str, ...], bool]:
    """The documented fields of a file or output: path -> whether it is optional."""
    mark = rf"<!-- fields: {re.escape(name)}(?: = [^\n]*)? -->\n((?:\|.*\n?)+)"
    found = re.findall(mark, "\n".join(FORMATS.values()))
    assert found, f"docs/formats has no fields of {name}"
    lines = [line for text in found for line in text.splitlines()[2:]]
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines]
    return {tuple(row[0].strip("`").replace("[]", ".[]").split(".")): "optional" in row[1] for row in rows}


def check_fields(name: str, value: Any) -> None:
    """Assert that `value` has every field that is documented and not optional, and none that is not documented."""
    documented = fields(name)
    seen: set[tuple[str, ...]] = set()

    def visit(value: Any, paths: list[tuple[str, ...]], depth: int, where: str) -> None:
        if any(len(path) == depth for path in paths):
            seen.update(path for path in paths if len(path) == depth)
        elif isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else [("[]", entry) for entry in value]
            for key, entry in items:
                named = [path for path in paths if path[depth] == key] or [path for path in paths if path[depth] == "*"]
                assert named, f"{name}: {where}.{key} is not documented"
                visit(entry, named, depth + 1, f"{where}.{key}")
        else:
            assert all(documented[path] for path in paths), (
                f"{name}: {where} is {value!r}, documented are fields below it"
            )

    visit(value, list(documented), 0, "")
    # what lies below `*` is absent where there is no such key, such as options of a method that has none
    missing = [
        ".".join(path) for path, optional in documented.items() if not optional and path not in seen and path[-1] != "*"
    ]
    assert not missing, f"{name}: documented but not there: {missing}"


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


TEXT = ("--calibration", "stdlib:train", "--samples", "4", "--length", "64")


@pytest.mark.slow
def test_files_and_outputs_have_exactly_the_documented_fields(playground: Path) -> None:
    model = "billhook/demo_model"
    check_fields(
        "measure --json", run("measure", model, "--metrics", "alpha_mid,outlier_ratio:5", *TEXT, "-o", "table.json")
    )
    check_fields("table.json", json.loads(Path("table.json").read_text(encoding="utf-8")))
    check_fields("gradients --json", run("gradients", model, *TEXT, "-o", "g.safetensors"))
    check_fields("gradients.safetensors", billhook.engine.gradient_file.open_gradients(Path("g.safetensors")).about)
    run(
        "prune",
        model,
        "--sparsity",
        "0.5",
        "--criterion",
        "gblm",
        "--gradients",
        "g.safetensors",
        *TEXT,
        "-o",
        "by-gblm",
    )
    check_fields("billhook.json", json.loads(Path("by-gblm/billhook.json").read_text(encoding="utf-8")))
    check_fields("plan.json", run("plan", "table.json", "--allocator", "owl", "--sparsity", "0.5", "-o", "plan.json"))
    check_fields("plan.json", json.loads(Path("plan.json").read_text(encoding="utf-8")))
    check_fields("prune --json", run("prune", model, "--plan", "plan.json", *TEXT, "-o", "pruned"))
    record = json.loads(Path("pruned/billhook.json").read_text(encoding="utf-8"))
    check_fields("billhook.json", record)
    check_fields("plan.json", record["steps"][0]["plan"])
    run("prune", model, "--sparsity", "0.5", "--criterion", "magnitude", "-o", "by-magnitude")
    check_fields("billhook.json", json.loads(Path("by-magnitude/billhook.json").read_text(encoding="utf-8")))
    check_fields(
        "prune --dry-run --json", run("prune", model, "--sparsity", "0.5", "--criterion", "magnitude", "--dry-run")
    )
    check_fields("verify --json", run("verify", "pruned"))
    check_fields("eval --json", run("eval", "pruned", "--data", "stdlib:heldout", "--length", "64", "--limit", "2"))
    scored = ["--data", "stdlib:heldout", "--length", "64", "--limit", "2", "--against", model, "--report"]
    check_fields("eval --json", run("eval", "pruned", *scored))
    check_fields("report.json", run("report", "pruned"))
    check_fields("report.json", json.loads(Path("by-magnitude/report.json").read_text(encoding="utf-8")))
    grid = [
        "--sparsities",
        "0.5",
        "--criteria",
        "magnitude,wanda",
        "--seeds",
        "2",
        "--data",
        "stdlib:heldout",
        "--limit",
        "2",
        *TEXT,
    ]
    check_fields("compare.json", run("compare", model, *grid, "-o", "grid"))
    check_fields("compare --runs --json", run("compare", "--runs", "grid", "grid"))
    for kind in ("allocators", "metrics", "families"):
        check_fields(f"ls {kind} --json", run("ls", kind))
    assert run("ls", "criteria")["criteria"][0].keys() == run("ls", "allocators")["allocators"][0].keys()


@pytest.mark.slow
def test_layers_in_pieces_have_the_documented_fields(tmp_path: Path) -> None:
    from families import build

    build("mixtral").save_pretrained(tmp_path / "model")
    billhook.prune(tmp_path / "model", sparsity=0.5, criterion="magnitude", output=tmp_path / "pruned")
    record = json.loads((tmp_path / "pruned" / "billhook.json").read_text(encoding="utf-8"))
    assert any("pieces" in facts for facts in record["layers"].values())
    check_fields("billhook.json", record)


def test_the_demo_prints_the_documented_fields() -> None:
    from billhook.demo import Demo

    demo = Demo(10.0, {("uniform", "wanda"): 12.0}, {("uniform", "wanda"): 0.5}, 100, 64, 1000, Path("out"))
    check_fields("demo --json", demo.to_json())


def test_an_undocumented_or_missing_field_is_noticed() -> None:
    good = {"output": "t", "layers": 1, "columns": ["a"]}
    check_fields("measure --json", good)
    with pytest.raises(AssertionError, match="not documented"):
        check_fields("measure --json", good | {"more": 1})
    with pytest.raises(AssertionError, match="columns"):
        check_fields("measure --json", {"output": "t", "layers": 1})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_inside_the_repository_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target} leads nowhere"
        if anchor:
            assert anchor in anchors(path), f"{page.name}: {target} has no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors GitHub gives to the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-") for heading in headings}
