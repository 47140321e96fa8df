"""Estimates before a run: they grow with what they depend on, and are within reach of what a run then takes."""

import time
from functools import partial

import pytest
import tiny
import torch
from billhook.costs import estimate as module
from billhook.costs.estimate import estimate, speeds
from command import done

from billhook.errors import Interrupted
from billhook.plan.plan import load_plan
from billhook.steps.prune import decide, run
from billhook.steps.request import Request
from billhook.steps.resolve import check

IDS = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def cost(model=None, **fields) -> dict[str, float]:
    fields = {"sparsity": 0.5, "calibration": IDS} | fields
    return estimate(check(Request(tiny.llama() if model is None else model, **fields)))


@pytest.fixture
def steady(monkeypatch):
    """A machine whose speeds do not change between two estimates."""
    found = speeds(torch.float32, "cpu", time.process_time)
    monkeypatch.setattr(module, "speeds", lambda *args, **kwargs: found)


def test_magnitude_costs_least_and_sparsegpt_most_memory():
    wide = tiny.llama(**WIDE)
    magnitude, wanda, sparsegpt = (cost(wide, criterion=name) for name in ("magnitude", "wanda", "sparsegpt"))
    assert magnitude["memory_gib"] <= wanda["memory_gib"] < sparsegpt["memory_gib"]
    assert set(magnitude) == {"seconds_least", "seconds", "memory_gib", "disk_gib"}
    assert (
        magnitude["disk_gib"]
        == wanda["disk_gib"]
        == pytest.approx(sum(p.numel() * 4 for p in wide.parameters()) / 2**30, abs=1e-3)
    )


def test_half_precision_takes_half_the_disk():
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    full, half = (
        cost(tiny.llama(**shape).to(dtype), criterion="magnitude")["disk_gib"]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half == pytest.approx(full / 2, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "wanda"},
        {"criterion": "gblm"},
        {"criterion": "sparsegpt"},
        {"criterion": "admm"},
        {"criterion": "wanda", "refine": "blocks"},
        {"criterion": "wanda", "allocator": "auto"},
        {"criterion": "admm", "allocator": "auto"},
    ],
    ids=lambda fields: " ".join(fields.values()),
)
def test_a_run_takes_what_was_said(fields, monkeypatch):
    """Within a factor of three, in processor time, which other work on the machine changes less than the clock."""
    monkeypatch.setattr(module, "speeds", partial(speeds, clock=time.process_time))
    draft = check(Request(tiny.llama(**WIDE), sparsity=0.5, calibration=IDS, **fields))
    said = estimate(draft)
    start = time.process_time()
    run(decide(draft))
    took = time.process_time() - start
    assert said["seconds_least"] / 3 < took < 3 * said["seconds"]


def test_auto_costs_three_prunes_on_half_the_text_and_more(steady):
    """With Wanda: two passes to prune; to choose, two for the columns, three of half a prune, and three and a half to
    score and go back. With ADMM the three prunes take three steps, the last one all."""
    wide, text = tiny.llama(**WIDE), torch.randint(0, 256, (256, 128))
    for criterion, least, most in (("wanda", 4.0, 7.5), ("admm", 2.0, 4.0)):
        uniform, auto = (
            cost(wide, calibration=text, criterion=criterion, allocator=allocator) for allocator in ("uniform", "auto")
        )
        assert least < auto["seconds"] / uniform["seconds"] < most
        assert auto["memory_gib"] > uniform["memory_gib"]


def test_refining_costs_its_epochs(steady):
    """Twenty at most and four at least, each three passes in float32 where pruning takes two in all."""
    wide, text = tiny.llama(**WIDE), torch.randint(0, 256, (256, 128))
    plain, refined = (cost(wide, calibration=text, refine=refine) for refine in ("none", "blocks"))
    most, least = refined["seconds"] - plain["seconds"], refined["seconds_least"] - plain["seconds_least"]
    assert 3.5 * least < most < 5 * least
    assert most > 10 * plain["seconds"]


def test_a_given_plan_or_table_saves_what_it_says(steady, tmp_path):
    model = tiny.save(tmp_path / "model", tiny.llama(**WIDE))
    words = ("--calibration", tiny.text_file(tmp_path / "text.txt", 40), "--samples", 8)
    done("measure", model, "--metrics", "outlier_ratio:5", *words, "-o", tmp_path / "t.json")
    done("plan", tmp_path / "t.json", "--allocator", "owl", "--sparsity", "0.5", "-o", tmp_path / "plan.json")
    measured = cost(model, allocator="owl")["seconds"]
    assert cost(model, allocator="owl", table=tmp_path / "t.json")["seconds"] < measured
    assert cost(model, sparsity=None, plan=load_plan(tmp_path / "plan.json"))["seconds"] < measured


def test_a_run_that_goes_on_costs_what_is_left(steady, tmp_path):
    fields = {"sparsity": 0.5, "criterion": "admm", "calibration": IDS, "output": tmp_path / "out"}
    model = tiny.save(tmp_path / "model", tiny.llama(**WIDE | {"num_hidden_layers": 4}))
    whole = estimate(check(Request(model, **fields)))["seconds"]
    with pytest.raises(Interrupted):
        run(decide(check(Request(model, **fields))), stopping=lambda: True)
    left = estimate(check(Request(model, resume=True, **fields)))["seconds"]
    assert 0.5 * whole < left < 0.9 * whole


def test_every_long_command_says_what_it_will_take_and_what_it_took(tmp_path):
    """In the same words."""
    model, text = (
        tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2)),
        tiny.text_file(tmp_path / "text.txt", 80),
    )
    words = ("--calibration", text, "--samples", 8, "--length", 32)
    done("measure", model, "-o", tmp_path / "table.json")
    done("plan", tmp_path / "table.json", "--allocator", "uniform", "--sparsity", "0.5", "-o", tmp_path / "plan.json")
    for command in (
        ("measure", model, "-o", tmp_path / "again.json"),
        ("gradients", model, *words, "-o", tmp_path / "gradients.safetensors"),
        ("prune", model, "--sparsity", 0.5, *words, "-o", tmp_path / "pruned"),
        ("search", model, "--sparsity", 0.5, "--allocator", "atp", "--budget", 1, *words, "-o", tmp_path / "found"),
        ("compare", model, "--sparsities", 0.5, "--data", text, *words, "-o", tmp_path / "grid"),
    ):
        said = done(*command).err
        assert said.count("About ") == said.count("It took ") == said.count("(estimated ") / 2 == 1, said
