"""Estimates before a run: they grow with what they depend on, and are within reach of what a run then takes."""

import time

import pytest
import tiny
import torch

from billhook.estimate import estimate
from billhook.job import prepare, run
from billhook.run.request import Request

IDS = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))


def cost(model=None, **fields) -> dict[str, float]:
    fields = {"sparsity": 0.5, "calibration": IDS} | fields
    return estimate(prepare(Request(tiny.llama() if model is None else model, **fields)))


def test_magnitude_costs_least_and_sparsegpt_most_memory():
    wide = tiny.llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    magnitude, wanda, sparsegpt = (cost(wide, criterion=name) for name in ("magnitude", "wanda", "sparsegpt"))
    assert magnitude["memory_gib"] <= wanda["memory_gib"] < sparsegpt["memory_gib"]
    assert set(magnitude) == {"seconds", "memory_gib", "disk_gib"}
    assert magnitude["disk_gib"] == wanda["disk_gib"] == pytest.approx(sum(p.numel() * 4 for p in wide.parameters()) / 2**30, abs=1e-3)


def test_half_precision_takes_half_the_disk():
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2}
    full, half = (cost(tiny.llama(**shape).to(dtype), criterion="magnitude")["disk_gib"] for dtype in (torch.float32, torch.bfloat16))
    assert half == pytest.approx(full / 2, abs=1e-3)


def test_a_run_takes_about_what_was_said():
    """Within a factor of ten on a machine that may be busy; what an estimate is for is telling seconds from hours."""
    wide = tiny.llama(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    job = prepare(Request(wide, sparsity=0.5, calibration=IDS, criterion="sparsegpt"))
    said = estimate(job)["seconds"]
    start = time.process_time()
    run(job)
    assert said / 10 < time.process_time() - start < 10 * said + 1
