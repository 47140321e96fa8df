"""How much training what is left recovers, on the golden text: perplexity before and after, with the target beside.

    python benchmarks/recover.py [--folder ../shared] [--only "babyllama-105 0.6"] [--tokens 102400] [--seed 0]
    python benchmarks/recover.py --only "babyllama-105 0.6" --tokens 41000 --tokens 204800 --picture recover.svg
    python benchmarks/recover.py --cost

Models are pruned with the 32 golden calibration windows and scored on 16 golden evaluation windows. They are trained on
TinyStories' training stories (babyllama-105) or the first 1500 documents of a C4 validation file (c4gut): texts that
have nothing in common with the evaluation windows, which are from TinyStories' held-out stories and WikiText-2. The
bundled model has windows and text of Python's standard library, held-out files apart. Rates are chosen on held-out
windows of the training text. *Closed* is the share of the log-perplexity above the dense model's
that is gone. Rows are kept in a file as they come, and not measured again; the picture has a line for each case, over
all numbers of tokens that are there. With --cost, tokens a second of processor time against transformers' Trainer on
the dense model.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from structured import perplexity
from torch import Tensor

from billhook import demo, load_calibration, load_model, prune, quantize, recover
from billhook.architectures.units import find_units
from billhook.plan.plan import Budget, Plan
from billhook.recovery.masked_adam import MaskedAdam
from billhook.recovery.training import steps_
from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.steps.recover import RecoverRequest, prepare
from billhook.steps.slim import slim
from billhook.store.checkpoint import load_tokenizer
from billhook.store.files import write_text

PUBLISHED = {"criterion": "sparsegpt", "allocator": "uniform"}
BEST = {"recipe": "best"}
CASES: dict[str, tuple[dict[str, Any], int, float | None]] = {  # how it is pruned, tokens, and the target
    "babyllama-105 0.6 sparsegpt": (PUBLISHED, 41_000, 3.35),
    "babyllama-105 0.6 best": (BEST, 102_400, 2.78),
    "babyllama-105 channels 232 of 352": ({}, 102_400, 2.97),
    "babyllama-105 int3/32": ({}, 102_400, None),
    "babyllama-105 int2/32": ({}, 102_400, None),
    "babyllama-105 0.7 best": (BEST, 102_400, None),
    "babyllama-105 2:4 best": (BEST, 102_400, None),
    "c4gut-llama-12x128 0.6 best": (BEST, 102_400, None),
    "c4gut-llama-12x128 0.7 best": (BEST, 102_400, None),
    "c4gut-llama-12x128 2:4 best": (BEST, 102_400, None),
    "c4gut-llama-12x128 0.6 sparsegpt": (PUBLISHED, 102_400, None),
    "bundled 0.6 best": (BEST, 102_400, None),
    "bundled 0.7 best": (BEST, 102_400, None),
    "bundled 2:4 best": (BEST, 102_400, None),
}
TEXTS = {"babyllama-105": ("tinystories_train1000.jsonl", None), "c4gut-llama-12x128": ("c4_validation_2k.jsonl", 1500)}


@dataclass(frozen=True)
class Home:
    """A model's directory, windows int64 [n, length] to prune with and to score, and a SOURCE to train on."""

    path: Path
    calibration: Tensor
    evaluation: Tensor
    text: str

    @classmethod
    def of(cls, folder: Path, model: str, place: Path) -> "Home":
        """That of a name; the documents of a golden model are written into `place`."""
        if model == "bundled":
            tokenizer = load_tokenizer(demo.MODEL)
            drawn = load_calibration(demo.CALIBRATION, tokenizer, samples=demo.SAMPLES, length=demo.LENGTH)
            return cls(demo.MODEL, drawn.ids, demo.evaluation_windows().ids, demo.CALIBRATION)
        name, count = TEXTS[model]
        lines = (folder / "text" / name).read_text(encoding="utf-8").splitlines()[:count]
        (place / name).write_text("\n".join(lines), encoding="utf-8")
        windows = (
            load_file(folder / "golden" / model / f"{part}.safetensors")["tokens"].long()[:samples]
            for part, samples in (("calibration", 32), ("evaluation", 16))
        )
        return cls(folder / "models" / model, *windows, str(place / name))


def smaller(home: Home, case: str, place: Path) -> Path:
    """The pruned, slimmed or quantized directory of a case."""
    what = case.split()[1]
    output = place / case.translate(str.maketrans(" :/", "___"))
    if what == "channels":
        units = find_units(load_model(home.path), ["channels"])
        plan = Plan(Budget("parameters", 1), {}, {unit.name: int(case.split()[2]) for unit in units})
        return slim(home.path, None, output, plan=plan, calibration=home.calibration).output
    if what.startswith("int"):
        return quantize(home.path, what, output, calibration=home.calibration).output
    asked = {"pattern": what} if ":" in what else {"sparsity": float(what)}
    pruned = prune(home.path, output=output, calibration=home.calibration, **asked, **CASES[case][0])
    assert pruned.output is not None
    return pruned.output


Row = dict[str, Any]


def score(folder: Path, case: str, wanted: list[tuple[int, int, str]]) -> Iterator[Row]:
    """The figures of a case for numbers of tokens, seeds and objectives."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        home = Home.of(folder, case.split()[0], place)
        start = smaller(home, case, place)
        dense, before = (
            perplexity(load_model(x, dtype="float32", quantized=True), home.evaluation) for x in (home.path, start)
        )
        for tokens, seed, objective in wanted:
            begun = time.process_time()
            fields = {"teacher": home.path, "calibration": home.text, "objective": objective}
            found = recover(start, place / "out", overwrite=True, tokens=tokens, seed=seed, **fields)
            after = perplexity(load_model(place / "out", dtype="float32", quantized=True), home.evaluation)
            key = {"case": case, "tokens": tokens, "seed": seed, "objective": objective}
            figures = {"dense": dense, "before": before, "after": after, "seconds": time.process_time() - begun}
            yield key | figures | {"rate": found.rate, "races": dict(found.races)}


def line(row: Row) -> str:
    """A row as text."""
    before, after, dense = row["before"], row["after"], row["dense"]
    closed = math.log(before / after) / math.log(before / dense)
    number, target = CASES[row["case"]][1:]
    aim = f" (target {target})" if target is not None and number == row["tokens"] else ""
    return (
        f"{row['case']:36} {row['tokens']:9,} tokens, seed {row['seed']}, {row['objective']}: {before:.3f} -> "
        f"{after:.3f}{aim}, dense {dense:.3f}, closed {closed:.0%}, {row['seconds']:.0f} s, "
        f"rate {row['rate']:.2%} of {json.dumps(row['races'])}"
    )


def picture(rows: list[Row]) -> str:
    """The share of the gap to the dense model that is closed, by the number of tokens, a line for each case, as SVG."""
    series = []
    for case in dict.fromkeys(row["case"] for row in rows):
        points: dict[int, list[float]] = {}
        for r in rows:
            if r["case"] == case:
                gone = math.log(r["before"] / r["after"]) / math.log(r["before"] / r["dense"])
                points.setdefault(r["tokens"], []).append(100 * gone)
        tokens = sorted(points)
        shares = [sum(points[number]) / len(points[number]) for number in tokens]
        labels = [f"{case}, {n:,} tokens: {share:.0f} %" for n, share in zip(tokens, shares, strict=True)]
        series.append(Series(case, [float(number) for number in tokens], shares, labels=labels))
    axes = Axis("tokens of training", log=True), Axis("share of the gap to the dense model that is closed (%)")
    summary = "The gap is that of the log-perplexity on held-out text after pruning. Higher is better."
    return chart("billhook recover: how far training goes", series, *axes, summary=summary, standalone=True)


def cost(folder: Path, objectives: list[str]) -> None:
    """Print tokens a second of processor time of a training step, and of the Trainer's on the dense model."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        home = Home.of(folder, "c4gut-llama-12x128", place)
        path, ids = home.path, home.calibration
        start = prune(path, output=place / "pruned", sparsity=0.6, criterion="magnitude", allocator="uniform").output
        plain = trainer_seconds(path, ids, place)
        print(f"Trainer, dense: {4 * 256 / plain:.0f} tokens a second")
        for objective in objectives:
            fields = {"teacher": path, "calibration": home.text, "tokens": 20 * 1024, "rate": 0.003, "batch_size": 4}
            job = prepare(RecoverRequest(model=start, output=place / "out", objective=objective, length=256, **fields))
            adam, times = MaskedAdam(job.setup.trained), [time.process_time()]
            for _ in steps_(job.setup, adam, 0.003):
                times.append(time.process_time())
            adam.close()
            step = (times[-1] - times[2]) / (len(times) - 3)
            print(f"{objective}: {4 * 256 / step:.0f} tokens a second, {plain / step:.2f} of it", flush=True)


def trainer_seconds(path: Path, ids: torch.Tensor, place: Path) -> float:
    """Processor time of a step of transformers' Trainer with AdamW, of 4 windows."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.process_time())

    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(3, 1)]
    shared = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    arguments = TrainingArguments(str(place / "trainer"), per_device_train_batch_size=4, num_train_epochs=1, **shared)
    Trainer(load_model(path, dtype="float32"), arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return (times[-1] - times[1]) / (len(times) - 2)


def main() -> None:
    """Measure what is missing, and print a line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--only", default="", help="the beginning of a case's name")
    parser.add_argument("--tokens", type=int, action="append", help="instead of those of the case")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--objective", action="append")
    parser.add_argument("--rows", type=Path, default=Path("recover.jsonl"))
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    if options.cost:
        cost(options.folder, options.objective or ["text", "kl", "kl+hidden"])
        return
    rows = [json.loads(text) for text in options.rows.read_text().splitlines()] if options.rows.exists() else []
    known = {(row["case"], row["tokens"], row["seed"], row["objective"]) for row in rows}
    for case in [name for name in CASES if name.startswith(options.only)]:
        wanted = product(options.tokens or [CASES[case][1]], options.seed or [0], options.objective or ["kl+hidden"])
        if missing := [one for one in wanted if (case, *one) not in known]:
            for row in score(options.folder, case, missing):
                rows.append(row)
                with options.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(line(row), flush=True)
    if options.picture is not None:
        shown = [row for row in rows if row["case"].startswith(options.only) and row["objective"] == "kl+hidden"]
        write_text(options.picture, picture(shown))


if __name__ == "__main__":
    main()
