"""Methods on a trained image-text model, by the exact match of its answers.

    python benchmarks/image_text.py FOLDER --questions QUESTIONS --picture docs/images/image-text.svg

FOLDER is the model's. QUESTIONS has `train.jsonl`, of which 128 questions are drawn for calibration, and `test.jsonl`,
as docs/vision.md describes them. Both stacks are pruned with one draw, the decoder alone with three, each with the
images and with the questions alone; a question of the test is always asked with its image. The allocation is uniform.

Each row is appended to `image-text.jsonl` in the working directory, so that an interrupted run continues. One thread.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from vision import picture

from billhook import load_model, prune
from billhook.engine.batch import Batch, join_rows, split_rows
from billhook.evaluation.rows import evaluate_rows
from billhook.store.files import write_text
from billhook.tasks.base import Drawing, Home
from billhook.tasks.opening import task_of

ROWS = Path("image-text.jsonl")
BOTH = (0.5, 0.6, 0.7, 0.8)
LANGUAGE, DRAWS = (0.5, 0.7), 3


@dataclass(frozen=True)
class Run:
    """One pruned model; with `images`, calibration questions are asked with their images."""

    stacks: str
    criterion: str
    sparsity: float
    seed: int = 0
    images: bool = True


RUNS = [Run("all", name, s) for name in ("magnitude", "wanda", "sparsegpt", "admm") for s in BOTH] + [
    Run("language", name, s, seed, images)
    for name in ("wanda", "sparsegpt", "admm")
    for s in LANGUAGE
    for images in (False, True)
    for seed in range(DRAWS)
]


class Bench:
    """A model's folder and its questions; the questions of the test in batches of one length."""

    def __init__(self, folder: Path, questions: Path) -> None:
        self.folder, self.questions = folder, questions
        model = self.load()
        self.task, self.image = task_of(model), model.config.image_token_id
        rows = list(self.task.inputs(str(questions / "test.jsonl"), model, Home(folder)).batches(None))
        rows.sort(key=lambda row: row["input_ids"].shape[1])
        self.test = split_rows(join_rows(rows), 100)

    def load(self) -> PreTrainedModel:
        """The dense model."""
        return load_model(self.folder, dtype="float32")

    def calibration(self, model: PreTrainedModel, run: Run) -> Iterator[Batch]:
        """Questions at random, perhaps without images and without their places in the text."""
        source = str(self.questions / "train.jsonl")
        drawn = self.task.samples(source, model, Home(self.folder), Drawing(seed=run.seed)).batch
        for batch in split_rows(drawn, 64):
            ids = batch["input_ids"]
            text = ids != self.image
            cut = {name: batch[name][text].view(len(ids), -1) for name in ("input_ids", "labels")}
            yield batch if run.images else cut

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """The exact match in %, and the nats a question."""
        scores = evaluate_rows(model, self.test, self.task)
        return {"exact_match": 100 * scores.exact_match, "nll": scores.nll}

    def row(self, run: Run) -> dict[str, Any]:
        """Prune a fresh model and score it."""
        model = self.load()
        calibration = list(self.calibration(model, run))
        prune(model, sparsity=run.sparsity, stacks=run.stacks, criterion=run.criterion, calibration=calibration)
        return asdict(run) | self.score(model)


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each method and sparsity, with the mean and the values of the draws."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        key = row["stacks"], row["criterion"], "with images" if row["images"] else "questions alone", row["sparsity"]
        found.setdefault(key, []).append(row["exact_match"])
    for key, values in found.items():
        print(*key, f"{statistics.mean(values):.1f}", [round(value, 1) for value in values])


def main() -> None:
    """All rows that are not there yet, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.folder, args.questions)
    dense = bench.score(bench.load())
    print("dense", dense, flush=True)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.exists() else []
    for run in RUNS:
        if not any(asdict(run).items() <= row.items() for row in rows):
            rows.append(bench.row(run))
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(rows[-1], flush=True)
    show(rows)
    if args.picture is not None:
        drawn: dict[str, dict[float, float]] = {}
        for row in rows:
            if row["stacks"] == "all":
                drawn.setdefault(row["criterion"], {})[row["sparsity"]] = row["exact_match"]
        title = "A small LLaVA, both stacks pruned (higher is better)"
        write_text(args.picture, picture(title, "exact match (%)", drawn, dense["exact_match"]))


if __name__ == "__main__":
    main()
