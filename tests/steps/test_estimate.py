"""Memory by the formula is near what runs need, and time measured on two blocks near what runs take."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import tiny
import torch
from command import done
from paths import DEMO, ROOT
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.architectures.layers import find_layers
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.errors import Interrupted, JobError
from billhook.methods.sparse import CRITERIA
from billhook.steps.estimate import PROCESS, estimate, peak_bytes
from billhook.steps.prune import decide, run
from billhook.steps.prune_job import PruneRequest
from billhook.steps.resolve import ResolvedRequest, check
from billhook.steps.sample_run import estimate_time

PAGE = ROOT / "docs" / "SCALE.md"
IDS = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
STREAMED = Resources(stream=object())  # only whether there is a stream counts in the formula
JOBS = [{"criterion": "wanda"}, {"criterion": "sparsegpt"}, {"criterion": "wanda", "allocator": "auto"}]
MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from billhook.demo import MODEL
from billhook.steps.estimate import PROCESS, estimate
from billhook.steps.prune import decide, run
from billhook.steps.prune_job import PruneRequest
from billhook.steps.resolve import check

def status(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
model, output, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ids = torch.randint(0, 1000, (32, 256), generator=torch.Generator().manual_seed(0))
run(decide(check(PruneRequest(MODEL, sparsity=0.5, criterion="wanda", calibration=ids[:2, :16]))))  # loaded once
job = check(PruneRequest(model, sparsity=0.5, calibration=ids, output=output, **({"criterion": "wanda"} | fields)))
held = sum(p.nbytes for p in job.opened.model.parameters() if not p.is_meta)
before = status("VmRSS") - held
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
run(decide(job))
print(estimate(job).memory_gib * 2**30 - PROCESS, status("VmHWM") - before)
"""
QUANTIZE = """
import sys
import torch
from billhook.steps.estimate import peak_gib
from billhook.steps.quantize import QuantizeRequest, prepare, run
from billhook.steps.sample_quantize import estimate_quantize

torch.set_num_threads(1)
ids = torch.randint(0, 1000, (16, 512), generator=torch.Generator().manual_seed(0))
job = prepare(QuantizeRequest(sys.argv[1], "int4/64", sys.argv[2], calibration=ids))
run(job)
print(estimate_quantize(job).memory_gib, peak_gib())
"""


def checked(model, **fields) -> ResolvedRequest:
    return check(PruneRequest(model, **({"sparsity": 0.5, "criterion": "wanda", "calibration": IDS} | fields)))


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("fields", JOBS, ids=lambda fields: " ".join(fields.values()))
def test_the_formula_is_near_the_measured_peak(fields, tmp_path):
    """Within a factor of 2, Python itself apart, for a model of 72 MB; most ratios are between 0.8 and 1.3."""
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    tiny.llama(**shape, vocab_size=1000, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path / "out", json.dumps(fields)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    formula, measured = map(float, ran.stdout.split())
    assert measured / 2 < formula < 2 * measured


def test_estimated_memory_grows_with_what_is_in_memory():
    wide, deep = tiny.llama(**WIDE), tiny.llama(**WIDE | {"num_hidden_layers": 4})
    options = {"tokens": 10**6, "batch_tokens": 1024, "resources": STREAMED}

    def needed(criterion: str, model=wide, **changes) -> float:
        needs = CRITERIA.needs(criterion, CRITERIA.configure(criterion, {}))
        return peak_bytes(model, find_layers(model), criterion, needs, **(options | changes))

    assert needed("magnitude") < needed("wanda") < needed("sparsegpt") < needed("admm")
    assert needed("wanda") < needed("gblm")
    assert needed("wanda", deep) == needed("wanda")
    blocks = sum(p.nbytes for p in deep.parameters()) - sum(p.nbytes for p in wide.parameters())
    assert needed("wanda", deep, resources=IN_MEMORY) - needed("wanda", resources=IN_MEMORY) == blocks
    little = replace(STREAMED, spill_gib=0.1)
    assert needed("wanda", resources=little) < needed("wanda") < needed("wanda", refine=True)
    assert needed("wanda", resources=IN_MEMORY) < needed("wanda", resources=IN_MEMORY, racing=True)


def test_logits_and_embeddings_count_where_they_are_larger_than_what_a_layer_needs():
    """Observing, changing and predicting follow each other: only the largest counts."""
    model = tiny.llama(**WIDE, vocab_size=5000)
    row, layers = 4 * 20000 * 5000, find_layers(model)

    def needed(**changes) -> float:
        return peak_bytes(model, layers, "gptq", ("gram",), tokens=4096, resources=STREAMED, **changes)

    assert needed(length=20000, fisher=True) - needed(length=20000) == 2 * row
    assert needed(length=20000, outside=2**20) == needed(length=20000) > needed(length=64) > needed()
    assert needed(outside=2**25) - needed(outside=2**24) == 4 * 4 * 2**24


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize("shape", [{"intermediate_size": 8192}, {"vocab_size": 60000}], ids=str)
def test_the_memory_of_quantizing_is_that_of_the_process(shape, tmp_path):
    """Between 10 % below and 25 % above the estimate: of a wide layer, and of a large vocabulary."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
    sizes |= {"vocab_size": 1000, "max_position_embeddings": 512}
    tiny.llama(**(sizes | shape)).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", QUANTIZE, tmp_path / "model", tmp_path / "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    formula, measured = map(float, ran.stdout.split())
    assert 0.9 * measured < formula < 1.25 * measured


def test_the_disk_holds_the_output_gradients_and_hidden_states_beyond_the_limit():
    full, half = (tiny.llama(**WIDE).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    size = sum(p.nbytes for p in full.parameters()) / 2**30
    assert estimate(checked(full, criterion="magnitude")).disk_gib == pytest.approx(size, abs=1e-3)
    assert estimate(checked(half, criterion="magnitude")).disk_gib == pytest.approx(size / 2, abs=1e-3)
    weights = sum(layer.weight.nbytes for layer in find_layers(full)) / 2**30
    assert estimate(checked(full, criterion="gblm")).disk_gib == pytest.approx(size + weights, abs=1e-3)
    text = torch.zeros(64, 128, dtype=torch.int64)
    spilled = text.numel() * 256 * 4 / 2**30
    found = estimate(checked(full, calibration=text, spill_gib=0)).disk_gib
    assert found == pytest.approx(size + spilled, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "magnitude"},
        {"criterion": "admm"},
        {"criterion": "gblm", "pattern": "2:4", "sparsity": None},
        {"refine": "blocks+norms"},
        {"targets": "re:.*2.mlp"},
    ],
    ids=str,
)
def test_measuring_time_changes_nothing_and_says_what_was_measured(fields):
    model = tiny.llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = estimate_time(checked(model, **fields))
    text = "" if fields.get("criterion") == "magnitude" else r" with \d+ of 16 windows"
    assert re.fullmatch(rf"2 of 3 blocks{text} in \d+\.\d s", found.measured)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_hidden_layers == 3


def test_a_model_is_restored_when_measuring_time_fails(monkeypatch):
    def failing(*_args: object, **_options: object) -> None:
        raise JobError("not finite")

    model = tiny.llama()
    monkeypatch.setattr("billhook.steps.sample_run.prune_with", failing)
    with pytest.raises(JobError):
        estimate_time(checked(model))
    assert len(model.model.layers) == model.config.num_hidden_layers == 3


@pytest.mark.nightly
@pytest.mark.gate
def test_the_estimate_of_a_resumed_run_is_for_the_remaining_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    source = tiny.save(tmp_path / "model", tiny.llama(**WIDE | {"num_hidden_layers": 8}))
    fields = {"criterion": "sparsegpt", "output": tmp_path / "out"}
    whole = estimate_time(checked(source, **fields)).seconds
    blocks = iter([False] * 5 + [True])
    with pytest.raises(Interrupted):
        run(decide(checked(source, **fields)), stopping=lambda: next(blocks))
    assert estimate_time(checked(source, resume=True, **fields)).seconds < 0.7 * whole


@pytest.mark.nightly
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt", "admm", "gblm"])
def test_a_run_takes_the_measured_time(criterion, tmp_path, monkeypatch):
    """Within a factor of 3, in processor time, which other work on the machine changes less than the clock."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    text = {} if criterion == "magnitude" else {"calibration": "stdlib:train", "samples": 32, "length": 256}
    job = check(PruneRequest(DEMO, sparsity=0.5, criterion=criterion, output=tmp_path / "out", **text))
    found = estimate_time(job).seconds
    begun = time.process_time()
    run(decide(job))
    took = time.process_time() - begun
    assert took / 3 < found + 0.1
    assert found < 3 * took


def test_a_dry_run_reads_the_model_one_block_at_a_time(tmp_path):
    """A model larger than the memory can be tried."""
    source = tiny.save(tmp_path / "model", tiny.llama())
    job = check(PruneRequest(source, sparsity=0.5, criterion="magnitude"), dry_run=True)
    assert all(layer.module.weight.is_meta for layer in job.opened.layers)


def test_a_run_prints_estimated_and_actual_memory(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama())
    said = done("prune", source, "--sparsity", 0.5, "--criterion", "magnitude", "-o", tmp_path / "out").err
    assert re.search(r"^About \d+\.\d\d GiB of memory and 0\.00 GiB of disk\.$", said, re.MULTILINE)
    assert re.search(r"^Peak memory: \d+\.\d\d GiB \(estimated \d+\.\d\d\)\.$", said, re.MULTILINE)


@pytest.mark.nightly
def test_the_page_has_the_numbers_of_the_formula():
    rows = [
        "| model | criterion | 1 process | 8 processes | `--allocator auto` |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {criterion} | {' | '.join(f'{value:.1f}' for value in cells)} |"
            for name, shape in LARGE.items()
            for criterion, cells in large(shape).items()
        ),
    ]
    assert "\n".join(rows) in PAGE.read_text(encoding="utf-8"), "\n".join(rows)


LARGE = {
    "7B": {},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_key_value_heads": 8},
    "405B": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_key_value_heads": 16,
        "vocab_size": 128256,
    },
}


def large(shape: dict[str, int]) -> dict[str, list[float]]:
    """GiB by criterion: with one process, with eight, and with the whole model in memory for `--allocator auto`."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=shape.get("hidden_size", 4096) // 128))
    model, found = model.to(torch.bfloat16), {}
    for criterion in ("magnitude", "wanda", "sparsegpt", "admm", "gblm"):
        needs = CRITERIA.needs(criterion, CRITERIA.configure(criterion, {}))
        text = {"tokens": 128 * 2048, "batch_tokens": 2048, "resources": STREAMED}
        cases = [text, text | {"tokens": 16 * 2048}, text | {"resources": IN_MEMORY, "racing": True}]
        found[criterion] = [
            (PROCESS + peak_bytes(model, find_layers(model), criterion, needs, **case)) / 2**30 for case in cases
        ]
    return found
