"""Pictures: charts, heat maps and masks contain their numbers; `billhook plot` writes every kind of them, and refuses
what it cannot draw."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ET
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from billhook.cli import app
from billhook.errors import BillhookError
from billhook.plan.allocators import allocate
from billhook.plan.table import Row, Table
from billhook.reports.charts import Series, chart
from billhook.reports.heat_maps import by_kind, heat_map, mask
from billhook.reports.pictures import error_by_sparsity, spectrum
from billhook.reports.scales import Axis, scale

LAYER = "model.layers.1.mlp.down_proj"
SVG = "{http://www.w3.org/2000/svg}"


def run(*arguments: object, code: int = 0) -> dict:
    result = CliRunner().invoke(app, ["plot", *map(str, arguments), "--json"])
    value = json.loads(result.stdout)
    assert value.get("exit_code", 0) == code, result.output
    return value


def texts(svg: str, tag: str = "text") -> list[str]:
    """The words of a picture, or its tooltips."""
    return [element.text or "" for element in ET.fromstring(svg).iter(SVG + tag)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [
        Row(f"blocks.{b}.{kind}", b, kind, (8, 8), {"alpha_peak": 2.0 + b + i, "outlier_ratio:5": 1.0 + b})
        for b in range(4)
        for i, kind in enumerate(("q", "down"))
    ]
    measured = Table(tuple(rows), {"name": "tiny"})
    measured.save(tmp_path / "table.json")
    for name in ("uniform", "alphapruning", "owl"):
        allocate(measured, 0.5, allocator=name).save(tmp_path / f"{name}.json")
    return tmp_path / "table.json"


def test_charts_without_points_or_with_a_single_value():
    for series in (
        [],
        [Series("a", [0], [1.0])],
        [Series("a", [0, 1], [None, math.inf])],
        [Series("a", [1, 2], [5, 5])],
    ):
        for axis in (Axis("y"), Axis("y", log=True), Axis("y", zero=True)):
            assert "nan" not in chart("t", series, Axis("x", whole=True), axis).lower()
    assert "&lt;b&gt;" in chart("<b>", [Series("<b>", [0, 1], [1, 2])], Axis("<b>"), Axis("y"))


@pytest.mark.parametrize(
    ("values", "axis"),
    [
        ([60.0001, 60.0002], Axis("y")),
        ([59.9, 60.1], Axis("y", span=10)),
        ([0.0, 0.0], Axis("y")),
        ([1e-7, 3e4], Axis("y", log=True)),
        ([5.1, 5.6], Axis("y", log=True)),
        ([20.0, 90.0], Axis("y", log=True)),
    ],
)
def test_axes_have_some_different_ticks(values, axis):
    svg = chart("t", [Series("", [0, 1], values)], Axis("x"), axis, standalone=True)
    ticks = scale(values, axis, 0, 1).ticks
    shown = [text for text in texts(svg) if re.fullmatch(r"-?[\d.]+(e-?\d+)?", text)]
    assert 2 <= len(ticks) <= 8
    assert len(set(shown[: len(ticks)])) == len(ticks)
    assert ticks[-1] - ticks[0] >= 0.8 * axis.span


def test_small_differences_do_not_fill_a_chart():
    for axis, least in ((Axis("y"), 1.04), (Axis("y", log=True), 1.45)):
        found = scale([60.0, 60.1], axis, 0, 1)
        assert found.high / found.low > least


def test_logarithmic_axes_say_so_and_have_a_mark_at_every_multiple():
    svg = chart("t", [Series("", [0, 1], [20.0, 90.0])], Axis("x"), Axis("y", log=True), standalone=True)
    assert "y (log scale)" in texts(svg)
    assert svg.count('class="bh-tick"') == 8  # 20, 30, ... 90


def test_outliers_do_not_stretch_the_colours_of_a_heat_map():
    values = [[1.0 + 0.1 * (i + j) for j in range(4)] for i in range(4)]
    values[3][3] = 1000.0
    svg = heat_map("t", list("abcd"), range(4), values, Axis("v"), x="block", standalone=True)
    assert "v, 1 beyond" in texts(svg)
    assert {"d, 3: 1000", "a, 0: 1"} <= set(texts(svg, "title"))
    assert len({e.get("fill") for e in ET.fromstring(svg).iter(SVG + "rect") if e.get("height") != "10"}) > 5


def test_names_stand_apart_at_the_ends_of_lines_or_below():
    series = [Series(f"line {k}", [0, 1], [k, 5 + 0.01 * k]) for k in range(6)]
    svg = chart("t", series, Axis("x"), Axis("y"), standalone=True)
    heights = sorted(
        float(e.get("y")) for e in ET.fromstring(svg).iter(SVG + "text") if (e.text or "").startswith("line")
    )
    assert all(b - a > 12 for a, b in pairwise(heights))
    ended = [*series, Series("short", [0, 0.5], [1, 2])]
    assert "short" in texts(chart("t", ended, Axis("x"), Axis("y"), standalone=True))


def test_heat_maps_show_every_number():
    rows, columns, values = by_kind(["q", "q", "down", "q"], [0, 0, 1, 1], [1.0, 3.0, 5.0, None])
    assert (rows, columns, values) == (["q", "down"], [0, 1], [[2.0, None], [None, 5.0]])
    svg = heat_map("<t>", rows, columns, values, Axis("v"), x="block", standalone=True)
    assert texts(svg, "title") == ["q, 0: 2", "down, 1: 5"]
    assert {"q", "down", "2", "5", "block", "v", "<t>"} <= set(texts(svg))
    large = [[0.0 if i == j else 10.0**-j for j in range(100)] for i in range(70)]
    svg = heat_map("t", list(map(str, range(70))), range(100), large, Axis("v", log=True), x="block", standalone=True)
    assert len(texts(svg, "title")) == 7000
    assert len(texts(svg)) < 100


def test_a_mask_is_drawn_as_an_image_of_tile_averages():
    svg = mask("t", [b"\x00\xff\x80", b"\xff\x00\x01"], (4, 6), standalone=True)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    start = data.index(b"IDAT") + 4
    assert zlib.decompress(data[start:-16]) == b"\x00\x00\xff\x80\x00\xff\x00\x01"


def test_the_command_draws_tables_and_plans(table: Path):
    folder = table.parent / "pictures"
    given = [f"--plan={table.parent / name}.json" for name in ("uniform", "alphapruning", "owl")]
    written = run(table, "--metric", "alpha_peak", "--metric", "outlier_ratio:5", *given, "-o", folder)["pictures"]
    assert [Path(path).name for path in written] == [
        "alpha_peak-by-layer.svg",
        "outlier_ratio_5-by-layer.svg",
        "sparsity-uniform.svg",
        "sparsity-alphapruning.svg",
        "sparsity-owl.svg",
        "sparsity-by-depth.svg",
    ]
    first, *_, last = (Path(path).read_text(encoding="utf-8") for path in written)
    assert texts(first, "title")[-1] == "down, 3: 6"
    assert "alpha_peak (larger: can lose more)" in texts(first)
    assert "alpha_peak by layer, tiny" in texts(first)
    assert {"uniform", "alphapruning", "owl", "sparsity (%)"} <= set(texts(last))
    before = Path(written[-1]).read_bytes()
    run(table, *given, "-o", folder)
    assert Path(written[-1]).read_bytes() == before


def test_error_curves_with_and_without_a_plan(tmp_path: Path):
    curve = tuple(k**2 / 1600 for k in range(41))
    rows = [
        Row(
            f"blocks.{b}.experts.{kind}",
            b,
            f"experts.{kind}.w",
            (8, 8),
            {"loss_share:admm": 1.0 + b},
            {"error_curve:admm": curve, "lamp_quantiles": (0.0, 1.0)},
        )
        for b in range(3)
        for kind in range(3)
    ]
    table = Table(tuple(rows), {"name": "tiny"})
    table.save(tmp_path / "table.json")
    allocate(table, 0.5).save(tmp_path / "half.json")
    written = run(tmp_path / "table.json", "-o", tmp_path)["pictures"]
    names = ["loss_share_admm-by-layer", "error_curve_admm", "error_curve_admm-at-50__"]
    assert [Path(path).stem for path in written] == names
    run(tmp_path / "table.json", "--metric", "error_curve:admm", "--plan", tmp_path / "half.json", "-o", tmp_path)
    text = (tmp_path / "error_curve_admm-at-half.svg").read_text(encoding="utf-8")
    assert texts(text, "title") == [f"experts.w, {block}: 0.25" for block in range(3)]
    assert texts(error_by_sparsity(table, "error_curve:admm"), "title")[9] == "experts.w: 50, 0.25"
    assert "lamp_quantiles" in run(tmp_path / "table.json", "--metric", "lamp_quantiles", code=2)["error"]


def test_the_command_draws_spectra_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, seed in (("one", 0), ("two", 1)):
        tiny.llama(seed).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    written = run("--model", "one", "--mask", "one", "--mask", "two", LAYER, "--layer", LAYER)["pictures"]
    assert written == [
        f"pictures/{name}.svg" for name in (f"spectrum-{LAYER}", f"mask-{LAYER}-one", f"mask-{LAYER}-two")
    ]
    assert any("alpha_peak = " in text for text in texts(Path(written[0]).read_text(encoding="utf-8")))
    assert f"Mask of {LAYER} in two: 100.0 % kept (white)" in Path(written[2]).read_text(encoding="utf-8")
    assert "has no prunable layer 'table.json'" in run("--model", "one", "table.json", code=2)["error"]
    assert "same name" in run("--mask", "one", "--mask", "../" + tmp_path.name + "/one", LAYER, code=2)["error"]


def test_what_cannot_be_drawn_is_refused(table: Path, tmp_path: Path):
    cases = {
        (): "Say what to draw",
        ("--model", "x"): "Say which LAYER",
        ("--plan", table.parent / "owl.json"): "give the TABLE",
        (table, "--layer", LAYER): f"Say of what {LAYER} is to be drawn",
        (table.parent, "--plan", table.parent / "owl.json"): "belong to a TABLE",
        (table.parent, "--metric", "alpha_peak"): "belong to a TABLE",
        (table, "--metric", "alpha_mid"): "no column 'alpha_mid'.*billhook measure MODEL --metrics alpha_mid",
        (table.parent / "owl.json",): "is not a table",
    }
    for arguments, message in cases.items():
        error = run(*arguments, "-o", tmp_path / "none", code=2)["error"]
        assert re.search(message, error), error
    other = Table((Row("elsewhere", 0, "w", (8, 8), {"alpha_peak": 2.0}),))
    other.save(tmp_path / "other.json")
    plan = ("--plan", table.parent / "owl.json")
    assert "is not a plan for" in run(tmp_path / "other.json", *plan, "-o", tmp_path / "none", code=2)["error"]
    tiny.llama().save_pretrained(tmp_path / "model")
    wrong = ("--model", tmp_path / "model", "--layer", LAYER[:-1])
    assert "Did you mean" in run(*wrong, "-o", tmp_path / "none", code=2)["error"]
    assert not (tmp_path / "none").exists()
    with pytest.raises(BillhookError, match="three positive"):
        spectrum("w", [1.0], {})
