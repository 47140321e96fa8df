"""One run in several processes gives the result of one process."""

import json
import os

import pytest
import torch
from processes import PRUNE, TEXT, done, together, weights

from billhook.steps.verify import verify

pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("criterion", ["sparsegpt", "admm", "gblm"])
def test_the_result_is_that_of_one_process(place, processes, criterion):
    """Sums over processes differ in the last bits, so weights may differ by 1e-4 of their size, and near ties may fall
    the other way."""
    fields = (*PRUNE, "--criterion", criterion)
    if not (place / f"{criterion}1").exists():
        done(place, 1, *fields, "-o", f"{criterion}1")
    log = f"{criterion}{processes}.jsonl"
    ran = done(place, processes, *fields, "-o", f"{criterion}{processes}", "--log-file", log)
    assert "weights removed" in ran.said[0]
    assert not any(ran.said[1:])
    assert verify(place / f"{criterion}{processes}").ok
    one, many = weights(place / f"{criterion}1"), weights(place / f"{criterion}{processes}")
    for name, value in one.items():
        moved = (value == 0) != (many[name] == 0)
        assert moved.float().mean() < 2e-3, name
        assert torch.allclose(value[~moved], many[name][~moved], rtol=1e-3, atol=1e-4), name
    for rank in range(processes):
        file = place / (log if rank == 0 else log.replace(".jsonl", f".rank{rank}.jsonl"))
        events = [json.loads(line) for line in file.read_text().splitlines()]
        assert events[0]["event"] == "start"
        assert events[-1]["event"] == "end"
        assert sum(event["event"] == "layer" for event in events) == events[0]["layers"]


def test_processes_that_see_other_experts_first_agree(place):
    fields = (*PRUNE[:6], "--samples", "16", "--length", "4", "--batch-size", "1", "--criterion", "admm")
    for processes in (1, 2):
        done(place, processes, *fields, "-o", f"short{processes}")
    one, two = weights(place / "short1"), weights(place / "short2")
    for name, value in one.items():
        likeness = torch.nn.functional.cosine_similarity(value.flatten(), two[name].flatten(), dim=0)
        assert likeness > 0.99, (name, likeness)


def test_auto_in_two_processes_gives_the_result_of_one(place):
    fields = (*PRUNE[:4], "--calibration", "text.txt", "--samples", "8", "--length", "32", "--batch-size", "4")
    done(place, 2, *fields, "--allocator", "auto", "--criterion", "wanda", "-o", "auto2")
    assert verify(place / "auto2").ok


@pytest.mark.parametrize("kinds", ["experts", "channels,heads"])
def test_units_that_go_are_those_of_one_process(place, kinds):
    """Experts are chosen from the tokens of all processes, so the bytes are the same; grams are sums."""
    fields = ("slim", "model", "--remove", "0.2", "--units", kinds, *TEXT)
    for processes in (1, 2):
        ran = done(place, processes, *fields, "-o", f"{kinds}{processes}")
        assert "of the parameters in blocks removed" in ran.said[0]
        assert not any(ran.said[1:])
        assert verify(place / f"{kinds}{processes}").ok
    (first, one), (second, two) = ((kept_parts(p), weights(p)) for p in (place / f"{kinds}1", place / f"{kinds}2"))
    assert first == second
    for name, value in one.items():
        if kinds == "experts":
            assert torch.equal(value, two[name]), name
        assert torch.allclose(value, two[name], rtol=1e-3, atol=1e-4), name


def kept_parts(folder):
    return json.loads((folder / "billhook.json").read_text())["steps"][-1]["made_by"]["kept"]


def test_tables_are_those_of_one_process(place):
    fields = ("measure", "model", "--metrics", "alpha_peak,outlier_ratio:5", *TEXT)
    for processes in (1, 2):
        done(place, processes, *fields, "-o", f"table{processes}.json")
    one, two = (json.loads((place / f"table{n}.json").read_text())["rows"] for n in (1, 2))
    for row, other in zip(one, two, strict=True):
        assert row["layer"] == other["layer"]
        assert row["metrics"] == pytest.approx(other["metrics"], rel=1e-3)


def test_fewer_windows_than_processes_are_refused(place):
    ran = together(place, 2, *PRUNE[:6], "--criterion", "wanda", "--samples", "1", "--length", "32", "-o", "few")
    assert ran.codes == [2, 2]
    assert "2 processes cannot share 1 calibration windows: give more --samples, or start fewer" in ran.said[0]
    assert not (place / "few").exists()
