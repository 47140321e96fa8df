"""The examples, and the methods that docs/add_a_method.md adds, do what they show."""

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
import tiny
import torch
from documentation import GUIDE, blocks
from paths import ROOT
from safetensors.torch import load_file

import billhook
from billhook import Table
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.plan.table import Row

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.nightly
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(example: Path, playground: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short_and_say_what_they_show(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert len(text.splitlines()) < 40


def test_the_sweep_of_the_examples_loads_no_torch() -> None:
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
    (code,) = blocks(GUIDE, "run: task")
    names: dict[str, Any] = {"__name__": "last_token"}
    exec(compile(code, "last_token.py", "exec"), names)
    ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(0))
    found = billhook.evaluate(tiny.llama(), ids, scoring=names["TASK"])
    assert (found.tokens, found.protocol) == (3, "perplexity of the last token of each window")


def test_the_sink_of_the_guide_writes_all_weights(tmp_path: Path) -> None:
    (code,) = blocks(GUIDE, "run: sink")
    names: dict[str, Any] = {"__name__": "one_file"}
    exec(compile(code, "one_file.py", "exec"), names)
    model = tiny.llama()
    names["OneFile"](model).write_all(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(written[name].equal(model.state_dict()[name]) for name in written)
    assert len(written) >= len(list(model.parameters())) - 1


def test_the_methods_of_the_guide_are_short_pages(tmp_path: Path) -> None:
    for mark in ("allocator", "criterion", "quantizer"):
        (code,) = blocks(GUIDE, f"run: {mark}")
        assert re.match(r'"""[A-Z]\w+: .*\.\n', code)


@pytest.mark.nightly
def test_the_plugin_of_the_guide_is_found_once_it_is_installed(playground: Path) -> None:
    (module,), (project,), (commands,) = (
        blocks(GUIDE, mark) for mark in ("run: allocator", "run: plugin", "run: with the plugin")
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
    (code,) = blocks(GUIDE, "run: allocator")
    names: dict[str, Any] = {"__name__": "depth"}
    exec(compile(code, "depth.py", "exec"), names)
    table = Table(tuple(Row(f"l{i}", i, "q", (8, 8 * (1 + i)), {}) for i in range(4)))
    for target in (0.0, 0.5, 0.9):
        shares = names["depth"](table, target, power=0.5)
        assert sum(shares[row.layer] * row.n for row in table) == pytest.approx(target * table.total)
    with pytest.raises(billhook.BillhookError, match="power"):
        names["depth"](table, 0.5, power=-1.0)


def test_the_criterion_of_the_guide_removes_what_is_asked() -> None:
    (code,) = blocks(GUIDE, "run: criterion")
    names: dict[str, Any] = {"__name__": "squares"}
    exec(compile(code, "squares.py", "exec"), names)
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    pruned = names["squares"](W, LayerStats(9, 1, torch.arange(1.0, 9.0)), Select((4, 8), 0.5, 16))
    assert int((pruned == 0).sum()) == 16
