"""Files and outputs have exactly the documented fields, and documented examples are read by the tool."""

import json
from pathlib import Path
from typing import Any

import pytest
from documentation import FORMATS, blocks, check_fields
from families import build
from typer.testing import CliRunner

import billhook
from billhook import Plan, Table, load_plan
from billhook.cli import app
from billhook.demo import Demo
from billhook.engine.gradient_file import open_gradients
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.spec import Pattern
from billhook.steps.verify import verify

TEXT = ("--calibration", "stdlib:train", "--samples", "4", "--length", "64")


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


def test_a_minimal_plan_is_read(tmp_path: Path) -> None:
    plan = {"version": 1, "target": 0.5, "pattern": "2:4", "sparsity": {"a": 0.5}}
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert load_plan(tmp_path / "plan.json") == Plan.of_sparsities(0.5, Pattern(2, 4), {"a": 0.5})


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout)
    return value


@pytest.mark.nightly
def test_files_and_outputs_have_exactly_the_documented_fields(playground: Path) -> None:
    model = "billhook/demo_model"
    check_fields(
        "measure --json", run("measure", model, "--metrics", "alpha_mid,outlier_ratio:5", *TEXT, "-o", "table.json")
    )
    check_fields("table.json", json.loads(Path("table.json").read_text(encoding="utf-8")))
    check_fields("gradients --json", run("gradients", model, *TEXT, "-o", "g.safetensors"))
    check_fields("gradients.safetensors", open_gradients(Path("g.safetensors")).about)
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
    check_fields("quantize --json", run("quantize", model, "--type", "int4", "--quantizer", "round", "-o", "int4"))
    check_fields(
        "quantize --dry-run --json",
        run("quantize", model, "--type", "q8_0", "--quantizer", "round", "-o", "dry", "--dry-run"),
    )
    small = run("slim", model, "--remove", "0.25", "--method", "magnitude", "--units", "channels", "-o", "slim")
    check_fields("slim --json", small)
    check_fields("billhook.json", json.loads(Path("slim/billhook.json").read_text(encoding="utf-8")))
    text = ["--calibration", "stdlib:train", "--length", "64", "--tokens", "4096"]
    check_fields("recover --json", run("recover", "pruned", "--teacher", model, *text, "-o", "better"))
    check_fields("billhook.json", json.loads(Path("better/billhook.json").read_text(encoding="utf-8")))
    check_fields("compress --json", run("compress", model, "--bits", "5.5", *TEXT, "-o", "small"))
    check_fields("billhook.json", json.loads(Path("small/billhook.json").read_text(encoding="utf-8")))
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


@pytest.mark.nightly
def test_layers_in_pieces_have_the_documented_fields(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path / "model")
    billhook.prune(tmp_path / "model", sparsity=0.5, criterion="magnitude", output=tmp_path / "pruned")
    record = json.loads((tmp_path / "pruned" / "billhook.json").read_text(encoding="utf-8"))
    assert any("pieces" in facts for facts in record["layers"].values())
    check_fields("billhook.json", record)


def test_the_demo_prints_the_documented_fields() -> None:
    demo = Demo(10.0, {("uniform", "wanda"): 12.0}, {("uniform", "wanda"): 0.5}, 100, 64, 1000, Path("out"), ["a note"])
    check_fields("demo --json", demo.to_json())


def test_an_undocumented_or_missing_field_is_noticed() -> None:
    good = {"output": "t", "layers": 1, "columns": ["a"]}
    check_fields("measure --json", good)
    with pytest.raises(AssertionError, match="not documented"):
        check_fields("measure --json", good | {"more": 1})
    with pytest.raises(AssertionError, match="columns"):
        check_fields("measure --json", {"output": "t", "layers": 1})
