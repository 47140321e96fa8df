"""Figures of the bundled model on the pages are of one protocol: they agree with each other, with the pictures, and
with a run."""

import platform
import re

import pytest
from documentation import PAGES
from paths import ROOT

from billhook import demo, evaluate, load_model, prune

HOME = ROOT / "docs" / "demo_model.md"
COLUMNS = ("magnitude", "wanda", "sparsegpt", "admm", "good")
NUMBER = r"(\d+\.\d+)"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def known() -> dict[tuple[str, int], str]:
    """The figures of docs/demo_model.md, as they are written: (method, per cent removed) -> perplexity."""
    (part,) = re.findall(r"^## Under pruning\n(.*?)^\| matrix", HOME.read_text(encoding="utf-8"), re.M | re.S)
    (dense,) = re.findall(rf"dense {NUMBER}", part)
    rows = re.findall(r"^\| (\d+) % \|(.*)\|$", part, re.M)
    found = {("dense", 0): dense}
    for sparsity, row in rows:
        found |= {(name, int(sparsity)): cell.strip() for name, cell in zip(COLUMNS, row.split("|"), strict=True)}
    return {key: cell for key, cell in found.items() if cell}


def agree(written: str, method: str, sparsity: int) -> bool:
    """Whether a figure is the known one, rounded to as many places as are written."""
    places = len(written.partition(".")[2])
    return f"{float(known()[method, sparsity]):.{places}f}" == written


def test_the_protocol_is_that_of_the_demo():
    page = text("docs/demo_model.md")
    assert f"--calibration {demo.CALIBRATION} --samples {demo.SAMPLES} --length {demo.LENGTH} --dtype float32" in page
    assert f"--data {demo.HELD_OUT} --length {demo.LENGTH} --limit {demo.EVALUATION_WINDOWS}" in page


def test_every_dense_perplexity_of_the_bundled_model_is_the_same():
    places = 0
    for page in PAGES:
        if page.name in ("LOG.md", "CHANGELOG.md"):  # whose figures are of their own experiments
            continue
        for part in re.split(r"\n\n", page.read_text(encoding="utf-8")):
            about = "bundled model" in part or "**bundled**" in part
            for written in re.findall(rf"\bdense(?: perplexity)? {NUMBER}", part) if about else ():
                assert agree(written, "dense", 0), (page.name, written)
                places += 1
    assert places >= 3


def test_readme_and_pages_have_the_figures_of_the_model_s_own_page():
    row = re.search(r"^\| magnitude \| Wanda \|.*\n.*\n\|(.*)\|$", text("README.md"), re.M)
    line = re.search(
        rf"perplexity at 60 %.*?magnitude {NUMBER}.*? {NUMBER}.*? {NUMBER}.*? {NUMBER}.*? {NUMBER}\.",
        text("docs/BENCHMARKS.md"),
    )
    for found in (row[1].split("|"), line.groups()):
        assert all(agree(cell.strip(), name, 60) for cell, name in zip(found, COLUMNS, strict=True)), found
    for page, name, sparsities in (
        ("choose_allocator", "dense", (0, 0, 0)),
        ("choose_allocator", "wanda + uniform", (50, 60, 70)),
        ("allocator_comparison", "uniform", (50, 60, 70)),
    ):
        cells = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", text(f"docs/{page}.md"), re.M)[1].replace("*", "")
        method = "dense" if name == "dense" else "wanda"
        assert all(agree(c.strip(), method, s) for c, s in zip(cells.split("|"), sparsities, strict=True)), cells


@pytest.mark.parametrize(
    ("picture", "names"), [("demo", (*COLUMNS[:3], "good, the default")), ("compare-perplexity", ["wanda + uniform"])]
)
def test_pictures_have_the_figures_of_the_page(picture, names):
    svg = text(f"docs/images/{picture}.svg")
    for name in names:
        for sparsity in (50, 60, 70):
            (drawn,) = re.findall(rf"<title>{re.escape(name)}: {sparsity}, {NUMBER}</title>", svg)
            assert float(drawn) == pytest.approx(float(known()[re.split(r"\W", name)[0], sparsity]), rel=3e-3)


@pytest.mark.nightly
def test_the_figures_are_those_of_a_run(tmp_path):
    if platform.python_version() != "3.11.7":
        pytest.skip("the text is the sources of Python 3.11.7")
    windows = demo.evaluation_windows()
    prune(demo.MODEL, sparsity=0.6, recipe="fast", output=tmp_path / "out", **demo.TEXT)
    for place, method, sparsity in ((demo.MODEL, "dense", 0), (tmp_path / "out", "wanda", 60)):
        found = evaluate(load_model(place, dtype="float32"), windows).token_ppl
        assert found == pytest.approx(float(known()[method, sparsity]), rel=2e-3)


def test_pages_count_the_families_of_the_list():
    (row,) = re.findall(r"^\| `text-generation` \|(.*)\|$", text("docs/methods/index.md"), re.M)
    counted = {
        (page.name, int(number))
        for page in PAGES
        if page.name not in ("LOG.md", "CHANGELOG.md")
        for number in re.findall(r"(\d+) (?:\[?model )?\[?families", page.read_text(encoding="utf-8"))
    }
    assert {name for name, _ in counted} >= {"README.md", "faq.md", "own_model.md"}
    assert {number for _, number in counted} == {row.count("`") // 2}


def test_the_page_of_what_to_expect_has_the_memory_of_the_page_of_sizes():
    sizes = text("docs/SCALE.md")
    rows = re.findall(rf"^\| (\d+B) \| {NUMBER} GiB \| {NUMBER} GiB \|", text("docs/expect.md"), re.M)
    (alone,) = re.findall(rf"\({NUMBER} and {NUMBER} GiB\)", text("docs/expect.md"))
    assert len(rows) == len(alone) == 2
    for (model, fast, good), admm in zip(rows, alone, strict=True):
        assert f"| {model} | wanda | {fast} |" in sizes
        assert re.search(rf"^\| {model} \| admm \| {admm} \| [\d.]+ \| {good} \|$", sizes, re.M)
