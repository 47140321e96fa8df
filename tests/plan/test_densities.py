"""Spectra and exponents in a report: the densities are those of the eigenvalues, and only a table of the same model is
taken."""

import json
import shutil

import numpy as np
import pytest
import tiny
from command import done, refused

from billhook.plan.allocators import allocate
from billhook.plan.densities import BINS, density, shown
from billhook.plan.table import Row, Table


def test_the_density_is_that_of_a_histogram():
    values = np.sort(np.exp(np.random.default_rng(0).normal(size=20_000)))
    quantiles = [values[min(len(values) - 1, round(k * len(values) / 128))] for k in range(129)]
    middles, heights = density(quantiles)
    edges = np.geomspace(values[0], values[-1], BINS + 1)
    assert middles == pytest.approx(np.sqrt(edges[1:] * edges[:-1]))
    assert np.sum(heights * np.diff(edges)) == pytest.approx(1)
    counted = np.histogram(values, edges)[0] / len(values)
    assert np.abs(heights * np.diff(edges) - counted).max() < 2 / 128


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0]])
def test_a_spectrum_of_equal_values_has_no_density(values):
    assert density(values) == ([], [])


def test_equal_eigenvalues_are_one_step_of_the_distribution():
    _, heights = density([1.0, 2.0, 2.0, 2.0, 4.0])
    assert all(height >= 0 for height in heights)


def test_the_plan_keeps_the_spectra_of_three_layers():
    rows = [
        Row(f"l{i}", i, "q", (8, 8), {"alpha_peak": alpha}, {"spectrum_quantiles": (1.0, 2.0 + i)})
        for i, alpha in enumerate([3, 1, 4, 2, 5])
    ]
    assert list(shown(Table(tuple(rows)))) == ["l1", "l0", "l4"]
    plan = allocate(Table(tuple(rows)), 0.5, allocator="alphapruning")
    assert plan.made_by["spectra"]["l4"] == [1.0, 6.0]
    assert "spectra" not in allocate(Table(tuple(rows)), 0.5).made_by
    assert shown(Table(tuple(Row(f"l{i}", i, "q", (8, 8)) for i in range(3)))) == {}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=2))
    tiny.save(folder / "other", tiny.llama(num_hidden_layers=2, seed=1))
    for name in ("model", "other"):
        done("measure", folder / name, "--metrics", "alpha_mid", "-o", folder / f"{name}.json")
    done("prune", folder / "model", "--sparsity", 0.5, "--criterion", "magnitude", "-o", folder / "pruned")
    return folder


@pytest.fixture
def pruned(place, tmp_path):
    shutil.copy(place / "model.json", tmp_path / "model.json")
    shutil.copy(place / "other.json", tmp_path / "other.json")
    return shutil.copytree(place / "pruned", tmp_path / "pruned")


def test_exponents_and_spectra_of_a_table_stay_in_the_report(pruned):
    before = (pruned / "report.html").read_text()
    assert "alpha_mid" not in before
    assert json.loads((pruned / "report.json").read_text())["spectra"] is None
    spectra = done("report", pruned, "--table", pruned.parent / "model.json", "--json").json["spectra"]
    table = Table.load(pruned.parent / "model.json")
    assert spectra["metrics"] == {"alpha_mid": dict(zip(table.shapes, table.column("alpha_mid"), strict=True))}
    assert list(spectra["quantiles"].values()) == [
        list(row.curves["spectrum_quantiles"]) for row in map(_row(table), spectra["quantiles"])
    ]
    page = (pruned / "report.html").read_bytes()
    for words in (
        "alpha_mid by layer",
        "Spectral density of a few layers",
        f"alpha_mid {min(table.column('alpha_mid')):.2f}",
    ):
        assert words in page.decode(), words
    done("report", pruned)
    assert (pruned / "report.html").read_bytes() == page
    assert done("verify", pruned, "--json").json["ok"]


def _row(table):
    return {row.layer: row for row in table}.__getitem__


def test_the_report_shows_the_spectra_that_a_run_read(place, tmp_path):
    for name in ("a", "b"):
        arguments = ("--sparsity", 0.5, "--allocator", "alphapruning", "--criterion", "magnitude")
        done("prune", place / "model", *arguments, "-o", tmp_path / name)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert len(report["spectra"]["quantiles"]) == 3
    assert "Spectral density of a few layers" in (tmp_path / "a" / "report.html").read_text()
    for file in ("billhook.json", "report.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_models_table_or_one_without_spectra_is_refused(place, pruned):
    refused(
        pruned.parent,
        "report",
        str(pruned),
        "--table",
        str(pruned.parent / "other.json"),
        match="not of the model that was pruned",
    )
    table = json.loads((place / "model.json").read_text())
    for row in table["rows"]:
        row.update(metrics={}, curves={})
    (pruned.parent / "empty.json").write_text(json.dumps(table))
    refused(
        pruned.parent,
        "report",
        str(pruned),
        "--table",
        str(pruned.parent / "empty.json"),
        match="has no spectra",
    )
