"""The demo: the default recipe on the bundled model, and beside it the published allocators and criteria.

The calibration text is the modules of Python's standard library on which the model was trained, the evaluation text
held-out ones.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from billhook.errors import BillhookError, JobError
from billhook.evaluation.perplexity import evaluate
from billhook.measurement.measure import measure
from billhook.plan.allocators import allocate
from billhook.plan.plan import Plan
from billhook.plan.recipes import DEFAULT, recipe
from billhook.plan.table import Table
from billhook.steps.apply import prune_
from billhook.steps.inputs import ModelRequest
from billhook.steps.prune import prune
from billhook.steps.request import open_request
from billhook.steps.verify import verify
from billhook.store.checkpoint import load_tokenizer, quiet
from billhook.store.output import check_output
from billhook.store.record import history
from billhook.text.windows import Windows, load_windows

MODEL = Path(__file__).parent / "demo_model"
# The protocol of every figure of the bundled model in README, docs and pictures, see docs/demo_model.md.
CALIBRATION, HELD_OUT = "stdlib:train", "stdlib:heldout"
SAMPLES, LENGTH, EVALUATION_WINDOWS = 32, 256, 64
TEXT: dict[str, Any] = {"calibration": CALIBRATION, "samples": SAMPLES, "length": LENGTH, "dtype": "float32"}
METRICS = ("alpha_peak", "outlier_ratio:5")
PUBLISHED = {  # criteria by allocator
    "uniform": ("magnitude", "wanda", "sparsegpt"),
    "alphapruning": ("wanda",),
    "atp": ("wanda",),
    "owl": ("wanda",),
}


@dataclass(frozen=True)
class Demo:
    """The results; `perplexity` and `achieved` sparsity are keyed by (allocator, criterion), the default recipe first.

    `notes` explain what stands out.
    """

    dense: float
    perplexity: dict[tuple[str, str], float]
    achieved: dict[tuple[str, str], float]
    tokens: int
    length: int
    weights: int
    output: Path
    notes: list[str] = field(default_factory=list)

    @property
    def allocators(self) -> list[str]:
        """The allocators that were run."""
        return list(dict.fromkeys(name for name, _ in self.perplexity))

    @property
    def criteria(self) -> list[str]:
        """The criteria that were run."""
        return list(dict.fromkeys(name for _, name in self.perplexity))

    def to_json(self) -> dict[str, Any]:
        """The content of `demo --json`."""
        cells = [
            {"allocator": a, "criterion": c, "token_ppl": ppl, "sparsity": self.achieved[a, c]}
            for (a, c), ppl in self.perplexity.items()
        ]
        text = {"dense_token_ppl": self.dense, "tokens": self.tokens, "length": self.length}
        return {**text, "cells": cells, "notes": self.notes, "output": str(self.output)}


def evaluation_windows() -> Windows:
    """The windows on which the bundled model is scored."""
    return load_windows(HELD_OUT, load_tokenizer(MODEL), length=LENGTH, limit=EVALUATION_WINDOWS)


def run_demo(output: Path, sparsity: float, say: Callable[[str], None] = print) -> Demo:
    """Prune the bundled model into `output` (replacing an earlier demo) with the default recipe, verify and score it;
    then score the published methods in memory."""
    check_output(output, MODEL, overwrite=_is_demo(output))
    say(f"The bundled model: {MODEL.name}, a small llama trained on Python's standard library.")
    windows = evaluation_windows()
    opened = open_request(ModelRequest(MODEL, **TEXT), True, "The demo")
    dense = evaluate(opened.model, windows)
    own = recipe(DEFAULT)
    say(f"Pruning with the default recipe, {DEFAULT}: {own.criterion} with the allocation of {own.allocator}.")
    report = prune(MODEL, sparsity=sparsity, output=output, overwrite=True, **TEXT)
    perplexity = {(own.allocator, own.criterion): _stock_perplexity(output, windows)}
    achieved = {(own.allocator, own.criterion): report.sparsity}
    say(f"perplexity {perplexity[own.allocator, own.criterion]:.2f}, dense {dense.token_ppl:.2f}. Published methods:")
    table = measure(opened.model, METRICS, batches=opened.batches, layers=opened.layers, facts=opened.facts)
    notes: list[str] = []
    for allocator, criteria in PUBLISHED.items():
        plan = allocate(table, sparsity, allocator=allocator)
        notes += removed_blocks(plan, table)
        for criterion in criteria:
            model = copy.deepcopy(opened.model)
            results = prune_(model, plan, criterion=criterion, batches=opened.batches)
            perplexity[allocator, criterion] = evaluate(model, windows).token_ppl
            achieved[allocator, criterion] = sum(r.zeros for r in results) / table.total
            say(f"{allocator} + {criterion}: perplexity {perplexity[allocator, criterion]:.2f}")
    return Demo(dense.token_ppl, perplexity, achieved, dense.tokens, LENGTH, table.total, output, notes)


def removed_blocks(plan: Plan, table: Table) -> list[str]:
    """A note where AlphaPruning's published epsilon, chosen for models of 32 blocks and more, removes one whole."""
    removed = [n for n, rows in table.blocks().items() if min(plan.sparsity[row.layer] for row in rows) == 1]
    epsilon, blocks = plan.made_by["options"].get("epsilon"), len(table.blocks())
    if epsilon is None or len(removed) != 1:
        return []
    why = f"the other {blocks - 1} blocks are alike, and it spreads all over one range"
    return [f"With its published epsilon of {epsilon:g}, alphapruning removes block {removed[0]} whole: {why}."]


def _is_demo(output: Path) -> bool:
    """Whether `output` is an earlier demo, which may be replaced; raises BillhookError where it holds anything else."""
    if not output.is_dir() or not any(output.iterdir()):
        return False
    record = history(output)
    if record is not None and record.steps[0].model.get("name") == MODEL.name:
        return True
    raise BillhookError(f"The output {output} is not empty and holds no earlier demo: choose another with --output.")


def _stock_perplexity(output: Path, windows: Windows) -> float:
    """Verify the directory, and score it as stock transformers opens it; raises JobError if it does not verify."""
    result = verify(output)
    if not result.ok:
        raise JobError(f"The saved model does not verify: {result.problems[0]}")
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    return evaluate(stock, windows).token_ppl
