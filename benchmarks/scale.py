"""Fit the prices of the cost model (`billhook.costs`) to small models, try them on other sizes, and tell what large models take.

    python benchmarks/scale.py              run all, fit, print prices, errors and the tables; about 10 minutes of one core
    python benchmarks/scale.py --stored     the same from benchmarks/results/scale.json
    python benchmarks/scale.py --write      put the tables into docs/SCALE.md

Each run is a process of its own with one thread. Its time is processor time, because other processes may be at work, and the speeds
of products and of copying are measured beside it, because they drift. The fit minimizes relative errors, prices being positive.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from billhook import costs
from billhook.costs import Machine, Text
from billhook.estimate import measuring_of, method_of, speeds

RESULTS = Path(__file__).parent / "results" / "scale.json"
PAGE = Path(__file__).parents[1] / "docs" / "SCALE.md"
JOBS = ("magnitude", "wanda", "sparsegpt", "admm", "gblm", "alpha_peak")
OPTIONS = {"sparsegpt": {"aim": 0.0}, "admm": {"aim": 0.0, "steps": 4}}  # what aiming at the dense model takes more is counted, not fitted
FITTED = ((128, 344, 12), (256, 704, 4), (512, 1408, 3), (1024, 2816, 2), (2048, 5632, 1))  # width, inner width, blocks
TRIED = ((768, 2048, 3), (2560, 6912, 1))
TEXT, VOCABULARY = Text(8, 256, 2), 512
# Computed, not measured: half the published peaks of an H100 SXM (989 TFLOP/s in bfloat16, 67 in float32, 3.35 TB/s), half of NVLink's
# 450 GB/s one way, half of 400 Gbit/s between machines. Files go as fast as here, because one core reads, checks and writes them.
GPU = {"product": 989e12 / 2, "single": 67e12 / 2, "copy": 3.35e12 / 2}
MACHINES = {"1 GPU": (1, 1.0), "8 GPUs": (8, 450e9 / 2), "2 x 8 GPUs": (16, 50e9 / 2), "8 x 8 GPUs": (64, 50e9 / 2)}
LARGE = Text(128, 2048, 1)
MODELS = {
    "7B": costs.llama(4096, 11008, 32),
    "70B": costs.llama(8192, 28672, 80, keys=1024),
    "405B": costs.llama(16384, 53248, 126, vocabulary=128256, keys=1024),
}


def run(model: Path, job: str) -> dict[str, float]:
    """One job on a model directory, in a copy of this process; returns processor seconds, peak bytes and speeds."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        before = speeds(torch.float32, "cpu", time.process_time)
        start = time.process_time()
        work(model, job)
        took = time.process_time() - start
        after = speeds(torch.float32, "cpu", time.process_time)
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        found = {"seconds": took, "peak": peak} | {key: (before[key] + after[key]) / 2 for key in before}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


def work(model: Path, job: str) -> None:
    """What is timed."""
    from billhook.job import measure_model, prepare
    from billhook.job import run as apply
    from billhook.run.request import Request

    ids = torch.randint(0, VOCABULARY, (TEXT.windows, TEXT.length), generator=torch.Generator().manual_seed(0))
    if job == "alpha_peak":
        measure_model(Request(model), [job])
        return
    fields: dict[str, Any] = {"options": OPTIONS.get(job, {})}
    fields |= {} if job == "magnitude" else {"calibration": ids, "batch_size": TEXT.batch}
    apply(prepare(Request(model, sparsity=0.5, criterion=job, output=model.parent / job, overwrite=True, **fields)))


def measure() -> list[dict[str, Any]]:
    """Every job at every size."""
    found = []
    for width, inner, blocks in (*FITTED, *TRIED):
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            rows = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": width // 64}
            config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=TEXT.length, **rows)
            model = LlamaForCausalLM(config)
            model.save_pretrained(Path(folder) / "model")
            del model
            for job in JOBS:
                found.append({"size": [width, inner, blocks], "job": job, **run(Path(folder) / "model", job)})
                print(found[-1], flush=True)
    return found


def amounts(row: dict[str, Any]) -> dict[str, float]:
    """The seconds of a run by kind at price 1."""
    width, inner, blocks = row["size"]
    sizes = costs.llama(width, inner, blocks, vocabulary=VOCABULARY, itemsize=4)
    machine = Machine(row["product"], row["single"], row["copy"])
    return costs.seconds(sizes, _method(row["job"]), TEXT, machine, dict.fromkeys(costs.PRICES, 1.0))


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Prices: least squares of relative errors over the inverse prices, none below zero, by turns."""
    kinds = list(costs.PRICES)
    matrix = np.array([[amounts(row).get(kind, 0.0) / row["seconds"] for kind in kinds] for row in rows])
    x = np.full(len(kinds), 1e-3)
    for _ in range(20000):
        for k in range(len(kinds)):
            column = matrix[:, k]
            rest = 1 - matrix @ x + column * x[k]
            x[k] = max(1e-9, column @ rest / (column @ column))
    return {kind: float(x[k] if kind in costs.COUNTED else 1 / x[k]) for k, kind in enumerate(kinds)}


def predicted(row: dict[str, Any], prices: dict[str, float]) -> float:
    """Seconds of a run by the model."""
    found = amounts(row)
    return sum(value * prices[kind] if kind in costs.COUNTED else value / prices[kind] for kind, value in found.items())


def tables(core: dict[str, float]) -> str:
    """Times and memory of the large models, as Markdown; `core` has the speeds of one core with bfloat16 products."""
    machines = {"1 core": Machine(**core), "2 cores": Machine(**{key: 2 * value for key, value in core.items()})}
    machines |= {name: Machine(**GPU, link=link, processes=count) for name, (count, link) in MACHINES.items()}
    lines = [f"| model | job | {' | '.join(machines)} |", f"| --- | --- |{' --- |' * len(machines)}"]
    for name, sizes in MODELS.items():
        for job in JOBS:
            found = [sum(costs.seconds(sizes, _method(job), LARGE, machine).values()) for machine in machines.values()]
            lines.append(f"| {name} | {job} | {' | '.join(map(_time, found))} |")
    lines += ["", "| model | job | 1 process | 8 processes | 64 processes |", "| --- | --- | --- | --- | --- |"]
    for name, sizes in MODELS.items():
        for job in JOBS:
            kept = [costs.memory(sizes, _method(job), LARGE, spill=8 * 2**30, processes=count) for count in (1, 8, 64)]
            lines.append(f"| {name} | {job} | {' | '.join(f'{value / 2**30:.1f}' for value in kept)} |")
    return "\n".join(lines)


def errors(rows: Sequence[dict[str, Any]]) -> str:
    """Predictions for the sizes that were not fitted, as Markdown."""
    lines = ["| size | job | processor time, s | predicted | error |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if tuple(row["size"]) in TRIED:
            width, inner, blocks = row["size"]
            said, took = predicted(row, costs.PRICES), row["seconds"]
            lines.append(f"| {width} x {inner}, {blocks} blocks | {row['job']} | {took:.2f} | {said:.2f} | {said / took - 1:+.0%} |")
    return "\n".join(lines)


def _method(job: str) -> costs.Method:
    return measuring_of([job]) if job == "alpha_peak" else method_of(job, OPTIONS.get(job))


def _time(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{0 if seconds >= 20 * length else 1}f} {unit}"
    return f"{seconds:.0f} s"


def main() -> None:
    """Measure or read, fit, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", action="store_true", help="use the stored runs")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/SCALE.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.stored or options.write):
        core = speeds(torch.bfloat16, "cpu", time.process_time)
        RESULTS.write_text(json.dumps({"core": core, "runs": measure()}, indent=1) + "\n")
    stored = json.loads(RESULTS.read_text())
    prices = fit([row for row in stored["runs"] if tuple(row["size"]) in FITTED])
    print(json.dumps({kind: float(f"{price:.3g}") for kind, price in prices.items()}, indent=4))
    for row in stored["runs"]:
        said, tried = predicted(row, costs.PRICES), "" if tuple(row["size"]) in FITTED else "  not fitted"
        error = said / row["seconds"] - 1
        print(f"{row['size']!s:18} {row['job']:10} {row['seconds']:7.2f} s, predicted {said:7.2f}: {error:+5.0%}{tried}")
    page = PAGE.read_text(encoding="utf-8")
    for mark, end, text in (("tables", "end", tables(stored["core"])), ("errors", "end errors", errors(stored["runs"]))):
        print(text)
        page = re.sub(rf"(?s)(<!-- {mark} -->\n).*?(?=<!-- {end} -->)", lambda found, text=text: f"{found[1]}\n{text}\n\n", page)
    if options.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
