"""`billhook compare`: every cell is what pruning and scoring by hand gives; it continues after an interruption; tables
and pictures."""

import csv
import io
import json
import math
import re
import statistics
import xml.etree.ElementTree as ET

import pytest
import tiny
from command import billhook, done

from billhook import allocate, measure, prune
from billhook.comparison.grid import Grid, compare
from billhook.comparison.record import differences, load_comparison, summary
from billhook.comparison.views import error_tables, markdown, pictures, score_table, spreadsheet
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import evaluate
from billhook.text.windows import load_windows

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.save(folder / "model")
    tiny.text_file(folder / "text.txt", copies=120)
    (folder / "scored.txt").write_text("".join(f"{i}! {tiny.TEXT[::-1]}" for i in range(12)), encoding="utf-8")
    return folder


TEXT = {"samples": 6, "length": 32}
GRID = Grid((0.3, 0.5), ("uniform", "owl"), ("magnitude", "wanda"), ("unstructured", "2:4"), 2)


@pytest.fixture(scope="module")
def made(place):
    return compare(
        place / "model",
        GRID,
        str(place / "scored.txt"),
        output=place / "grid",
        calibration=str(place / "text.txt"),
        **TEXT,
    )


def test_every_cell_is_a_run_of_its_own(place, made):
    assert len(made.cells) == 3 * 7  # two sparsities and 2:4; magnitude + uniform does not depend on the seed
    windows = load_windows(str(place / "scored.txt"), tiny.tokenizer(), length=32)
    for row in made.cells[:7]:
        model = tiny.llama()
        model.name_or_path = str(place / "model")
        fields = {"sparsity": row["sparsity"], "seed": row["seed"], "calibration": str(place / "text.txt"), **TEXT}
        prune(model, allocator=row["allocator"], criterion=row["criterion"], **fields)
        assert evaluate(model, windows).nll == pytest.approx(row["nll"], rel=1e-6), row
        assert row["achieved"] == pytest.approx(row["sparsity"], abs=1e-4)
    assert made.dense["nll"] == pytest.approx(evaluate(tiny.llama(), windows).nll)
    assert all(len(row["error_by_block"]) == 3 and min(row["error_by_block"]) > 0 for row in made.cells)


@pytest.mark.nightly
def test_a_recipe_is_one_method_of_a_comparison_and_is_what_prune_makes_of_it(place):
    grid = Grid((0.6,), (), (), ("unstructured", "2:4"), recipes=("good", "best"))
    text = {"calibration": str(place / "text.txt"), "samples": 16, "length": 32}
    found = compare(place / "model", grid, str(place / "scored.txt"), **text)
    assert [(row["recipe"], row["pattern"], row["allocator"]) for row in found.cells] == [
        ("good", "unstructured", "auto"),
        ("best", "unstructured", "auto"),
        ("good", "2:4", "uniform"),
        ("best", "2:4", "uniform"),
    ]
    assert [row[0] for row in score_table(found)[1]] == ["dense", "good", "best"]
    windows = load_windows(str(place / "scored.txt"), tiny.tokenizer(), length=32)
    for row in found.cells:
        model = tiny.llama()
        model.name_or_path = str(place / "model")
        budget = {"pattern": row["pattern"], "sparsity": row["sparsity"]}
        assert prune(model, recipe=row["recipe"], **budget, **text).record["steps"][0]["made_by"]["recipe"]
        assert evaluate(model, windows).nll == pytest.approx(row["nll"], rel=1e-6), row


@pytest.mark.nightly
def test_an_interrupted_comparison_continues(place, made, tmp_path):
    class Enough(Exception):
        pass

    seen = []

    def stop(line):
        seen.append(line)
        if len(seen) == 5:
            raise Enough

    fields = {"output": tmp_path / "grid", "calibration": str(place / "text.txt"), **TEXT}
    with pytest.raises(Enough):
        compare(place / "model", GRID, str(place / "scored.txt"), progress=stop, **fields)
    compare(place / "model", GRID, str(place / "scored.txt"), progress=lambda line: seen.append(line), **fields)
    assert len(seen) == len(made.cells)
    assert (tmp_path / "grid" / "compare.json").read_bytes() == (place / "grid" / "compare.json").read_bytes()
    with pytest.raises(BillhookError, match="another comparison: its data was"):
        compare(place / "model", GRID, str(place / "scored.txt"), limit=2, **fields)


def test_plans_are_compared_beside_allocators(place, tmp_path):
    model = tiny.llama()
    plans = {name: allocate(measure(model, []), s) for name, s in (("plan a", 0.2), ("plan b", 0.6))}
    fields = {"calibration": str(place / "text.txt"), "output": tmp_path / "grid", **TEXT}
    grid = Grid((0.6,), plans=plans)
    found = compare(place / "model", grid, str(place / "scored.txt"), **fields)
    rows = {row["allocator"]: row for row in found.cells}
    assert [row["sparsity"] for row in found.cells] == [0.6, 0.2, 0.6]
    assert rows["plan b"]["nll"] == rows["uniform"]["nll"] > rows["plan a"]["nll"]
    assert all(x < y for x, y in zip(rows["plan a"]["error_by_block"], rows["plan b"]["error_by_block"], strict=True))
    assert list(error_tables(found)) == [f"Relative squared error of each block's output at {s} %" for s in (60, 20)]
    with pytest.raises(BillhookError, match="used another plan a"):
        compare(place / "model", Grid(plans={"plan a": plans["plan b"]}), str(place / "scored.txt"), **fields)
    other = allocate(measure(tiny.llama(num_hidden_layers=2), []), 0.5)
    with pytest.raises(BillhookError, match="not for this model"):
        compare(place / "model", Grid(plans={"other": other}), str(place / "scored.txt"), **fields)


def test_the_command_shows_errors_by_depth_for_plans(place, tmp_path):
    for name, sparsity in (("a", 0.3), ("b", 0.5)):
        allocate(measure(tiny.llama(), []), sparsity).save(tmp_path / f"{name}.json")
    plans = f"{tmp_path / 'a.json'},{tmp_path / 'b.json'}"
    words = ["--criteria", "magnitude", "--data", place / "scored.txt", "--length", 32, "-o", tmp_path / "grid"]
    ran = done("compare", place / "model", "--plans", plans, "--errors", *words)
    for words in ("magnitude + plan a", "Relative squared error of each block's output at 30 %", "at 50 %"):
        assert words in ran.out
    drawn = {path.name for path in (tmp_path / "grid").iterdir()}
    assert {"error-30.svg", "error-50.svg"} <= drawn
    assert "sparsity-30.svg" not in drawn  # it is the same everywhere


def test_means_and_spreads_over_seeds():
    def cell(criterion, seed, nll):
        where = {
            "pattern": "unstructured",
            "sparsity": 0.5,
            "allocator": "uniform",
            "criterion": criterion,
            "seed": seed,
        }
        return where | {"nll": nll, "token_ppl": math.exp(nll)}

    cells = [cell("a", s, x) for s, x in enumerate((1.0, 1.2, 1.4))] + [
        cell("b", s, x) for s, x in enumerate((1.5, 1.6, 1.7))
    ]
    cells.append(cell("c", 0, 1.25))
    a, _, c = summary(cells)
    assert (a["mean_nll"], a["spread_nll"]) == (pytest.approx(1.2), pytest.approx(statistics.stdev((1.0, 1.2, 1.4))))
    assert c["spread_nll"] is None
    verdicts = {(d["better"][0], d["worse"][0]): d["larger_than_spread"] for d in differences(cells)}
    assert verdicts == {("a", "b"): True, ("a", "c"): False, ("c", "b"): True}
    assert differences(cells[:1] + cells[3:4]) == []  # one seed says nothing of spread


def test_the_tables_agree_with_the_cells(made):
    rows = list(csv.DictReader(io.StringIO(spreadsheet(made))))
    assert [float(row["nll"]) for row in rows] == [cell["nll"] for cell in made.cells]
    text = markdown(made)
    assert "token perplexity over non-overlapping windows" in text
    for entry in summary(made.cells):
        assert f"{entry['mean_token_ppl']:.2f}" in text
    assert text.count(" *") >= 3  # the best of each column


def test_pictures_contain_their_numbers_and_show_allocators_by_colour_criteria_by_dash(made):
    drawn = pictures(made)
    assert set(drawn) == {
        "perplexity",
        "sparsity-30",
        "error-30",
        "sparsity-50",
        "error-50",
        "error-2of4",  # without the sparsity, which is the same everywhere
    }
    for svg in drawn.values():
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert len(root.get("aria-label")) > 20
        assert "nan" not in svg
    entry = r'<g class="(bh-s\d)"><line[^>]*stroke-dasharray="([^"]*)"[^>]*/>.*?<text[^>]*>(\w+) \+ (\w+)</text>'
    looks = {(c, a): (colour, dash) for colour, dash, c, a in re.findall(entry, drawn["perplexity"])}
    assert len(set(looks.values())) == len(looks) == 4
    for (criterion, allocator), (colour, dash) in looks.items():
        assert all((colour == c) == (allocator == a) for (_, a), (c, _) in looks.items())
        assert all((dash == d) == (criterion == x) for (x, _), (_, d) in looks.items())
    titles = [t.text for t in ET.fromstring(drawn["perplexity"]).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 2 * 4
    assert titles[0] == f"magnitude + uniform: 30, {summary(made.cells)[0]['mean_token_ppl']:.4g}"


def test_the_command_writes_all_files_and_compares_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words = ["--criteria", "magnitude", "--data", "scored.txt", "--length", 32]
    ran = done("compare", "model", "--sparsities", "0.4", *words, "-o", tmp_path / "one")
    assert "token perplexity over non-overlapping windows" in ran.out
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        "compare.json", "compare.md", "compare.csv", "error-40.svg",
    }  # fmt: skip
    other = done("compare", "model", "--sparsities", "0.6", *words, "-o", tmp_path / "two", "--json").json
    assert other == json.loads((tmp_path / "two" / "compare.json").read_text())
    found = done("compare", "--runs", tmp_path / "one", tmp_path / "two", "--json").json
    assert sorted(row["run"] for row in found["runs"]) == ["one", "two"]
    assert found["runs"] == sorted(found["runs"], key=lambda row: row["nll"])
    assert other["cells"][0]["nll"] in [row["nll"] for row in found["runs"]]
    assert "one" in done("compare", "--runs", tmp_path / "one", tmp_path / "two").out


def test_runs_that_differ_are_refused(place, tmp_path, made):
    def changed(name, **changes):
        value = json.loads((place / "grid" / "compare.json").read_text())
        for key, change in changes.items():
            value["identity"][key] = value["identity"][key] | change if isinstance(change, dict) else change
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "compare.json").write_text(json.dumps(value))
        return tmp_path / name

    same = changed("same")
    for other, words in (
        (changed("text", data={"digest": "0" * 64, "source": "else.txt"}), "else.txt"),
        (changed("length", data={"length": 16}), "their window lengths differ (32 and 16)"),
        (changed("count", data={"windows": 3}), "numbers of windows"),
        (changed("protocol", protocol="word perplexity"), "their protocol differ"),
        (changed("versions", versions={"torch": "1.0"}), "different versions of torch"),
    ):
        ran = billhook("compare", "--runs", same, other)
        assert ran.code == 2
        assert "cannot be compared" in ran.err
        assert words in ran.err
    assert billhook("compare", "--runs", same, changed("again")).code == 0
    (tmp_path / "empty").mkdir()
    ran = billhook("compare", "--runs", same, tmp_path / "empty")
    assert (ran.code, "holds no finished run" in ran.err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsities", "0.5"], "A comparison needs one MODEL"),
        (["--sparsities", "0.5,x", "--data", "scored.txt", "-o", "g"], "write numbers separated by commas"),
        (["--sparsities", "1.5", "--data", "scored.txt", "-o", "g"], "in [0, 1)"),
        (["--data", "scored.txt", "-o", "g"], "needs --sparsities"),
        (["--sparsities", "0.5", "--allocators", "olw", "--data", "scored.txt", "-o", "g"], "Did you mean 'owl'?"),
        (["--sparsities", "0.5", "--data", "scored.txt", "-o", "g"], "needs activations"),
        (["--sparsities", "0.5", "--criteria", "magnitude", "--data", "no.txt", "-o", "g"], "no file no.txt"),
        (
            ["--sparsities", "0.5", "--criteria", "magnitude", "--data", "scored.txt", "-o", "model"],
            "holds no compare.json",
        ),
        (
            ["--sparsities", "0.5", "--set", "epsilno=1", "--data", "scored.txt", "-o", "g"],
            ", criterion 'admm') has an option 'epsilno'. Did you mean 'steps'? Their options: steps, rho",
        ),
        (["--runs"], "two or more directories"),
        (["--runs", "--data", "scored.txt"], "leave out the options of a new comparison"),
        (
            ["--sparsities", "0.5", "--patterns", "2:4", "--data", "scored.txt", "-o", "g"],
            "An N:M pattern has its own sparsity",
        ),
    ],
)
def test_unusable_comparisons_are_refused(options, message, place, monkeypatch):
    monkeypatch.chdir(place)
    ran = billhook("compare", "model", *options)
    assert ran.code == 2
    assert message in ran.err
    assert not (place / "g").exists()


def test_a_damaged_record_is_named(place, tmp_path, made):
    value = json.loads((place / "grid" / "compare.json").read_text())
    for change in ({"version": 9}, {"cells": [{}]}, {"identity": None}):
        (tmp_path / "compare.json").write_text(json.dumps(value | change))
        with pytest.raises(BillhookError, match=r"compare\.json"):
            load_comparison(tmp_path)
