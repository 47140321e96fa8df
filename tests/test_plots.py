"""Pictures: every kind is written, says what it shows, and refuses what it cannot draw. Whether they are good, eyes
must judge."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from billhook.cli import app
from billhook.errors import BillhookError
from billhook.plan.allocators import allocate
from billhook.plan.plan import load_plan
from billhook.plan.table import Row, Table

pytest.importorskip("matplotlib", reason="needs matplotlib")

from billhook.reports import plots
from billhook.reports.curves_picture import error_curves

LAYER = "model.layers.1.mlp.down_proj"


def run(*arguments: object, code: int = 0) -> dict:
    result = CliRunner().invoke(app, ["plot", *map(str, arguments), "--json"])
    value = json.loads(result.stdout)
    assert value.get("exit_code", 0) == code, result.output
    return value


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        Row(
            f"blocks.{b}.{kind}",
            b,
            kind,
            (8, 8),
            {"alpha_peak": 2.0 + b + i, "outlier_ratio:5": 1.0 + b, "alpha_peak_ks": 0.1},
        )
        for b in range(4)
        for i, kind in enumerate(("q", "down"))
    ]
    measured = Table(tuple(rows), {"name": "tiny"})
    measured.save(tmp_path / "table.json")
    for name in ("uniform", "alphapruning", "owl"):
        allocate(measured, 0.5, allocator=name).save(tmp_path / f"{name}.json")
    allocate(measured, 0.5, allocator="alphapruning", mapping="layer").save(tmp_path / "by-layer.json")
    return tmp_path / "table.json"


def texts(picture: Path) -> str:
    """Comments of matplotlib's SVG, which hold the text that is drawn."""
    return picture.read_text(encoding="utf-8")


def test_tables_and_plans(table: Path) -> None:
    folder = table.parent / "pictures"
    plans = {name: table.parent / f"{name}.json" for name in ("uniform", "alphapruning", "owl", "by-layer")}
    given = [f"--plan={path}" for path in plans.values()]
    written = run(table, "--metric", "alpha_peak", "--metric", "outlier_ratio:5", *given, "-o", folder)["pictures"]
    stems = {Path(path).stem for path in written}
    assert stems == {
        *(
            "alpha_peak-by-depth",
            "outlier_ratio_5-by-depth",
            "alpha_peak-against-sparsity",
            "outlier_ratio_5-against-sparsity",
        ),
        "sparsity-by-depth",
    }
    assert all(Path(path).stat().st_size > 2000 for path in written)
    assert "Tail exponent of the weight spectrum" in texts(folder / "alpha_peak-by-depth.svg")
    assert "of tiny" in texts(folder / "sparsity-by-depth.svg")
    again = plots.sparsity_by_depth(Table.load(table), {name: load_plan(path) for name, path in plans.items()})
    plots.save(again, folder / "again", "sparsity-by-depth")
    assert (folder / "again/sparsity-by-depth.png").read_bytes() == (folder / "sparsity-by-depth.png").read_bytes()


@pytest.mark.parametrize("metric", ["alpha_peak", "alpha_peak_ks", "outlier_ratio:5"])
def test_axes_say_what_they_show(table: Path, metric: str) -> None:
    axes = plots.metric_by_depth(Table.load(table), metric).axes[0]
    assert metric in axes.get_title(loc="left")
    assert axes.get_ylabel().startswith(metric)
    assert "block" in axes.get_xlabel()


def test_error_curves_with_and_without_a_plan(tmp_path: Path) -> None:
    curve = tuple(k**2 / 1600 for k in range(41))
    rows = [
        Row(
            f"blocks.{b}.{kind}",
            b,
            kind,
            (8, 8),
            {"loss_share:admm": 1.0 + b},
            {"error_curve:admm": curve, "lamp_quantiles": (0.0, 1.0)},
        )
        for b in range(3)
        for kind in "abcde"
    ]
    table = Table(tuple(rows), {"name": "tiny"})
    table.save(tmp_path / "table.json")
    allocate(table, 0.5, allocator="curves").save(tmp_path / "half.json")
    written = run(tmp_path / "table.json", "-o", tmp_path)["pictures"]
    assert {Path(path).stem for path in written} == {"loss_share_admm-by-depth", "error_curve_admm"}
    run(tmp_path / "table.json", "--metric", "error_curve:admm", "--plan", tmp_path / "half.json", "-o", tmp_path)
    text = texts(tmp_path / "error_curve_admm-half.svg")
    assert "What pruning does to the output of each layer of tiny" in text
    assert "what the plan takes" in text
    figure = error_curves(table, "error_curve:admm", allocate(table, 0.5))
    dots = [line for axes in figure.axes[:5] for line in axes.lines if line.get_marker() == "o"]
    assert [(dot.get_xdata()[0], dot.get_ydata()[0]) for dot in dots] == [(50, 25)] * 15
    assert "lamp_quantiles" in run(tmp_path / "table.json", "--metric", "lamp_quantiles", code=2)["error"]


def test_spectra_and_masks(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        tiny.llama(seed).save_pretrained(tmp_path / name)
    written = run(
        "--model",
        tmp_path / "one",
        "--layer",
        LAYER,
        "--mask",
        tmp_path / "one",
        "--mask",
        tmp_path / "two",
        "-o",
        tmp_path,
    )
    assert [Path(path).name for path in written["pictures"] if path.endswith("png")] == [
        f"spectrum-{LAYER}.png",
        f"mask-{LAYER}.png",
    ]
    assert LAYER in texts(tmp_path / f"mask-{LAYER}.svg")


def test_the_layer_of_masks_and_spectra_may_stand_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.llama().save_pretrained(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    assert len(run("--mask", "one", LAYER)["pictures"]) == 2
    assert (tmp_path / "pictures" / f"mask-{LAYER}.svg").exists()
    assert len(run("--model", "one", LAYER, "--layer", LAYER, "-o", "other")["pictures"]) == 2
    assert "has no prunable layer 'table.json'" in run("--model", "one", "table.json", code=2)["error"]


def test_large_masks_are_averaged_not_sampled() -> None:
    import numpy

    keep = numpy.zeros((2100, 5), dtype=bool)
    keep[::3] = True
    shrunk = plots._shrunk(keep)
    assert shrunk.shape == (700, 5)
    assert shrunk == pytest.approx(1 / 3)


def test_what_cannot_be_drawn_is_said(table: Path, tmp_path: Path) -> None:
    cases = {
        (): "Say what to draw",
        ("--model", "x"): "Say which LAYER",
        ("--plan", table.parent / "owl.json"): "give the TABLE",
        (table, "--metric", "alpha_mid"): "no column 'alpha_mid'.*billhook measure MODEL --metrics alpha_mid",
        (table.parent / "owl.json",): "is not a table",
    }
    for arguments, message in cases.items():
        error = run(*arguments, "-o", tmp_path / "none", code=2)["error"]
        assert re.search(message, error), error
    other = Table((Row("elsewhere", 0, "w", (8, 8), {"alpha_peak": 2.0}),))
    other.save(tmp_path / "other.json")
    assert (
        "do not belong together"
        in run(tmp_path / "other.json", "--plan", table.parent / "owl.json", "-o", tmp_path / "none", code=2)["error"]
    )
    tiny.llama().save_pretrained(tmp_path / "model")
    assert (
        "Did you mean"
        in run("--model", tmp_path / "model", "--layer", LAYER[:-1], "-o", tmp_path / "none", code=2)["error"]
    )
    assert not (tmp_path / "none").exists()
    with pytest.raises(BillhookError, match="three positive"):
        plots.spectral_density("w", [1.0, 2.0], {})


def test_without_matplotlib_it_says_what_to_install(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'billhook[plots]'" in run(table, "-o", table.parent / "none", code=2)["error"]
