"""Fit the prices of the cost model (`billhook.costs.prices`) to small models, try them on other sizes, and tell what
large models take.

    python benchmarks/scale.py              run all, fit, print prices, errors and the tables; about 15 minutes of one
    core python benchmarks/scale.py --stored     the same from benchmarks/results/scale.json python benchmarks/scale.py
    --write      put the tables into docs/SCALE.md

Each run is a process of its own with one thread. Its time is processor time, because other processes may be at work,
and the speeds of products, attention, copying and small operations are measured beside it, because they drift. The fit
minimizes relative errors, prices being positive. The model that comes with Billhook is tried as well, in its own type.
"""

import argparse
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from billhook.costs import counts, prices, workload
from billhook.costs.counts import Count, Sizes, Text
from billhook.costs.estimate import shapes_of, sizes_of, speeds, text_of
from billhook.costs.prices import Machine
from billhook.costs.workload import Case, Phase
from billhook.demo import MODEL
from billhook.engine.loop import prune_
from billhook.plan.allocators import allocate
from billhook.plan.table import Row, Table
from billhook.recover.blockwise import Refine
from billhook.steps.prune import measure_opened, open_to_measure, prepare
from billhook.steps.prune import run as apply
from billhook.steps.request import Opened, Request, open_request

RESULTS = Path(__file__).parent / "results" / "scale.json"
PAGE = Path(__file__).parents[1] / "docs" / "SCALE.md"
JOBS = ("magnitude", "wanda", "sparsegpt", "admm", "aimed", "gblm", "alpha_peak", "shares", "refined")
OPTIONS = {
    "sparsegpt": {"dense_target": 0.0},
    "admm": {"dense_target": 0.0, "steps": 4},
    "aimed": {"dense_target": 0.5, "steps": 4},
}
CRITERION = {"aimed": "admm", "refined": "wanda"}
BESIDE = counts.Method(dense=True, beside=True, touches=False)  # the dense model's pass that refining takes besides
LARGE_JOBS = ("magnitude", "wanda", "sparsegpt", "admm", "gblm", "alpha_peak")
FITTED = (
    (64, 172, 6),
    (128, 344, 12),
    (256, 704, 4),
    (512, 1408, 3),
    (1024, 2816, 2),
    (2048, 5632, 1),
)  # width, inner width, blocks
TRIED = ((768, 2048, 3), (2560, 6912, 1))
BUNDLED = (128, 352, 12)
VOCABULARY, EPOCHS = 512, 3
# Prices as single operations have them that were timed by themselves on narrow layers; and how much these hold the fit.
ALONE = {
    "product": 0.8,
    "attention": 0.8,
    "backward": 0.8,
    "train": 0.8,
    "gram": 0.6,
    "solve": 1.4,
    "rows": 0.05,
    "spectrum": 0.8,
    "elements": 0.14,
    "watch": 0.015,
    "logits": 0.03,
    "select": 0.0045,
    "handle": 0.002,
    "file": 0.67,
    "call": 14.0,
    "op": 1.0,
    "layer": 800.0,
    "run": 24000.0,
}
HOLD = 0.2
# Computed, not measured: half the published peaks of an H100 SXM (989 TFLOP/s in bfloat16, 67 in float32, 3.35 TB/s),
# attention at a quarter, 5 microseconds to start an operation, half of NVLink's 450 GB/s one way and of 400 Gbit/s
# between machines. Files go as fast as here, because one core reads, checks and writes them.
GPU = {"product": 989e12 / 2, "attention": 989e12 / 4, "single": 67e12 / 2, "copy": 3.35e12 / 2, "op": 5e-6}
MACHINES = {"1 GPU": (1, 1.0), "8 GPUs": (8, 450e9 / 2), "2 x 8 GPUs": (16, 50e9 / 2), "8 x 8 GPUs": (64, 50e9 / 2)}
LARGE = Text(128, 2048, 1)
MODELS = {
    "7B": counts.llama(4096, 11008, 32),
    "70B": counts.llama(8192, 28672, 80, keys=1024),
    "405B": counts.llama(16384, 53248, 126, vocabulary=128256, keys=1024),
}


def run(opened: Opened, model: Path, job: str) -> dict[str, float]:
    """One job on a model, in a copy of this process; returns processor seconds, peak bytes and speeds."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        shapes, dtype = shapes_of(opened), opened.model.dtype
        work = prepared(opened, model, job)
        before = speeds(dtype, "cpu", time.process_time, **shapes)
        start = time.process_time()
        work()
        took = time.process_time() - start
        after = speeds(dtype, "cpu", time.process_time, **shapes)
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        found = {"seconds": took, "peak": peak} | {key: (before[key] + after[key]) / 2 for key in before}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


def prepared(opened: Opened, model: Path, job: str) -> Callable[[], Any]:
    """What is timed, once everything is opened and checked."""
    criterion, text = CRITERION.get(job, job), text_of(opened)
    if job == "alpha_peak":
        streamed = open_to_measure(Request(model), [job])
        return lambda: measure_opened(streamed, [job])
    if job == "shares":
        return lambda: measure_opened(opened, ["loss_share:wanda"])
    if job == "refined":
        plan = allocate(
            Table(tuple(Row(x.name, x.block, x.kind, x.shape) for x in opened.layers)), 0.5, allocator="uniform"
        )
        return lambda: prune_(
            opened.model, plan, criterion=criterion, batches=opened.batches, refine=Refine(epochs=EPOCHS)
        )
    seen = {} if job == "magnitude" else {"calibration": torch.cat(opened.batches), "batch_size": text.batch}
    options = {"options": OPTIONS.get(job, {}), "output": model.parent / job, "overwrite": True}
    checked = prepare(Request(model, sparsity=0.5, criterion=criterion, **options, **seen))
    return lambda: apply(checked)


def phases(case: Case, job: str) -> list[Phase]:
    """The same, counted."""
    criterion = CRITERION.get(job, job)
    if job in ("alpha_peak", "shares"):
        return [*workload.measure(case, [job if job == "alpha_peak" else "loss_share:wanda"])]
    if job == "refined":
        tuned = [*counts.walk(case.sizes, BESIDE, case.text), *counts.refine(case.sizes, case.text, EPOCHS)]
        return [*workload.prune(case, criterion, {}), Phase(tuned, 0.0)]
    return [*workload.prune(case, criterion, OPTIONS.get(job, {}), write=True)]


def work(case: Case, job: str) -> list[Count]:
    """Everything that a job does."""
    return [count for phase in phases(case, job) for count in phase.counts]


def measure() -> list[dict[str, Any]]:
    """Every job at every size."""
    found = []
    for width, inner, blocks in (*FITTED, *TRIED, BUNDLED):
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            if (width, inner, blocks) == BUNDLED:
                shutil.copytree(MODEL, model)
            else:
                _random(model, width, inner, blocks)
            text = _text(width)
            ids = torch.randint(0, VOCABULARY, (text.windows, text.length), generator=torch.Generator().manual_seed(0))
            opened = open_request(Request(model, calibration=ids, batch_size=text.batch), True, "A benchmark")
            facts = {"size": [width, inner, blocks], "text": asdict(text)}
            for job in JOBS if width <= 1024 else JOBS[:-1]:  # tuning a wide block takes minutes
                found.append({**facts, "job": job, **run(opened, model, job)})
                print({key: found[-1][key] for key in ("size", "job", "seconds")}, flush=True)
    return found


def _text(width: int) -> Text:
    """Windows of two lengths, in batches as runs have them."""
    return Text(128, 64, 64) if width <= 64 else Text(32, 256, 16) if width <= 256 else Text(8, 256, 2)


def _random(place: Path, width: int, inner: int, blocks: int) -> None:
    """A model of the Llama family with random weights."""
    torch.manual_seed(0)
    rows = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 64,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **rows)).save_pretrained(place)


def _sizes(size: Sequence[int]) -> Sizes:
    """Those of a model that was run."""
    if tuple(size) == BUNDLED:
        return sizes_of(open_request(Request(MODEL), False, "A benchmark"))
    return counts.llama(*size, vocabulary=VOCABULARY, itemsize=4)


def amounts(row: dict[str, Any]) -> dict[str, float]:
    """The seconds of a run by kind at price 1."""
    machine = Machine(**{name: row[name] for name in ("product", "single", "copy", "attention", "op")})
    return prices.seconds(
        work(Case(_sizes(row["size"]), Text(**row["text"])), row["job"]), machine, dict.fromkeys(prices.PRICES, 1.0)
    )


def fit(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Prices: least squares of relative errors over the inverse prices, none below zero, by turns; a relative change
    from `ALONE` counts as a relative error times `HOLD`, for many kinds of work always come together."""
    kinds = list(prices.PRICES)
    alone = np.array([ALONE[kind] if kind not in prices.SPEEDS else 1 / ALONE[kind] for kind in kinds])
    matrix = np.array([[amounts(row).get(kind, 0.0) / row["seconds"] for kind in kinds] for row in rows]) * alone
    matrix, wanted = (
        np.vstack([matrix, HOLD * np.eye(len(kinds))]),
        np.concatenate([np.ones(len(rows)), np.full(len(kinds), HOLD)]),
    )
    x = np.ones(len(kinds))
    for _ in range(20000):
        for k in range(len(kinds)):
            column = matrix[:, k]
            rest = wanted - matrix @ x + column * x[k]
            x[k] = max(1e-3, column @ rest / (column @ column))
    return {
        kind: float((x * alone)[k] if kind not in prices.SPEEDS else 1 / (x * alone)[k]) for k, kind in enumerate(kinds)
    }


def predicted(row: dict[str, Any], at: dict[str, float]) -> float:
    """Seconds of a run by the model."""
    found = amounts(row)
    return sum(value * at[kind] if kind not in prices.SPEEDS else value / at[kind] for kind, value in found.items())


def tables(core: dict[str, float]) -> str:
    """Times and memory of the large models, as Markdown; `core` has the speeds of one core with bfloat16 products."""
    machines = {"1 core": Machine(**core), "2 cores": Machine(**{key: 2 * value for key, value in core.items()})}
    machines |= {name: Machine(**GPU, link=link, processes=count) for name, (count, link) in MACHINES.items()}
    lines = [f"| model | job | {' | '.join(machines)} |", f"| --- | --- |{' --- |' * len(machines)}"]
    for name, sizes in MODELS.items():
        for job in LARGE_JOBS:
            found = [
                sum(prices.seconds(work(Case(sizes, LARGE, processes=machine.processes), job), machine).values())
                for machine in machines.values()
            ]
            lines.append(f"| {name} | {job} | {' | '.join(map(_time, found))} |")
    lines += ["", "| model | job | 1 process | 8 processes | 64 processes |", "| --- | --- | --- | --- | --- |"]
    for name, sizes in MODELS.items():
        for job in LARGE_JOBS:
            kept = [_held(sizes, job, count) for count in (1, 8, 64)]
            lines.append(f"| {name} | {job} | {' | '.join(f'{value / 2**30:.1f}' for value in kept)} |")
    return "\n".join(lines)


def errors(rows: Sequence[dict[str, Any]]) -> str:
    """Predictions for the sizes that were not fitted, as Markdown."""
    lines = ["| size | job | processor time, s | predicted | error |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if tuple(row["size"]) not in FITTED:
            width, inner, blocks = row["size"]
            said, took = predicted(row, prices.PRICES), row["seconds"]
            lines.append(
                f"| {width} x {inner}, {blocks} blocks | {row['job']} | {took:.2f} | {said:.2f} | "
                f"{said / took - 1:+.0%} |"
            )
    return "\n".join(lines)


def _held(sizes: Sizes, job: str, processes: int) -> float:
    """The memory of one process, hidden states beyond 8 GiB on disk."""
    return max(phase.memory for phase in phases(Case(sizes, LARGE, spill=8 * 2**30, processes=processes), job))


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
        core = speeds(torch.bfloat16, "cpu", time.process_time, attention=(1, 2, 2048, 128))
        RESULTS.write_text(json.dumps({"core": core, "runs": measure()}, indent=1) + "\n")
    stored = json.loads(RESULTS.read_text())
    fitted = fit([row for row in stored["runs"] if tuple(row["size"]) in FITTED])
    print(json.dumps({kind: float(f"{price:.3g}") for kind, price in fitted.items()}, indent=4))
    for row in stored["runs"]:
        said, tried = predicted(row, prices.PRICES), "" if tuple(row["size"]) in FITTED else "  not fitted"
        error = said / row["seconds"] - 1
        print(
            f"{row['size']!s:18} {row['job']:10} {row['seconds']:7.2f} s, predicted {said:7.2f}: {error:+5.0%}{tried}"
        )
    page = PAGE.read_text(encoding="utf-8")
    for mark, end, text in (
        ("tables", "end", tables(stored["core"])),
        ("errors", "end errors", errors(stored["runs"])),
    ):
        print(text)
        page = re.sub(
            rf"(?s)(<!-- {mark} -->\n).*?(?=<!-- {end} -->)", lambda found, text=text: f"{found[1]}\n{text}\n\n", page
        )
    if options.write:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
