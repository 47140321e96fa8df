"""The demo: the main allocators with the main criteria on the bundled model, on text of Python's standard library.

The calibration text is the modules on which the model was trained, the evaluation text held-out ones.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from billhook.engine.method import Method
from billhook.errors import BillhookError, JobError
from billhook.evaluation.perplexity import evaluate
from billhook.measurement.measure import measure
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import allocate
from billhook.plan.plan import Plan
from billhook.steps.apply import prune_
from billhook.steps.prune import Job, run
from billhook.steps.request import Opened, Request, open_request
from billhook.steps.verify import verify
from billhook.store.checkpoint import load_tokenizer, quiet
from billhook.store.output import check_output
from billhook.store.record import history
from billhook.text.windows import load_windows

MODEL = Path(__file__).parent / "demo_model"
SAMPLES, LENGTH, EVALUATION_WINDOWS = 32, 256, 64
METRICS = ("alpha_peak", "outlier_ratio:5")
SHOWN_ALLOCATORS = ("uniform", "alphapruning", "atp", "owl")
SHOWN_CRITERIA = ("magnitude", "wanda", "sparsegpt")


@dataclass(frozen=True)
class Demo:
    """The results; `perplexity` and `achieved` sparsity are keyed by (allocator, criterion)."""

    dense: float
    perplexity: dict[tuple[str, str], float]
    achieved: dict[tuple[str, str], float]
    tokens: int
    length: int
    weights: int
    output: Path

    @property
    def allocators(self) -> list[str]:
        """The allocators that were run."""
        return list(dict.fromkeys(name for name, _ in self.perplexity))

    @property
    def criteria(self) -> list[str]:
        """The criteria that were run."""
        return list(dict.fromkeys(name for _, name in self.perplexity))

    @property
    def best(self) -> tuple[str, str]:
        """The (allocator, criterion) with the lowest perplexity."""
        return min(self.perplexity, key=lambda pair: self.perplexity[pair])

    def to_json(self) -> dict[str, Any]:
        """The content of `demo --json`."""
        cells = [
            {"allocator": a, "criterion": c, "token_ppl": ppl, "sparsity": self.achieved[a, c]}
            for (a, c), ppl in self.perplexity.items()
        ]
        text = {"dense_token_ppl": self.dense, "tokens": self.tokens, "length": self.length}
        return {**text, "cells": cells, "output": str(self.output)}


def run_demo(output: Path, sparsity: float, say: Callable[[str], None] = print) -> Demo:
    """Prune the bundled model in twelve ways, save the best to `output` (replacing an earlier demo), and verify it."""
    check_output(output, MODEL, overwrite=_is_demo(output))
    say(f"The bundled model: {MODEL.name}, a small llama trained on Python's standard library.")
    text: dict[str, Any] = {"calibration": "stdlib:train", "samples": SAMPLES, "length": LENGTH}
    request = Request(MODEL, **text, dtype="float32", output=output, overwrite=True)
    opened = open_request(request, True, "The demo")
    windows = load_windows("stdlib:heldout", load_tokenizer(MODEL), length=LENGTH, limit=EVALUATION_WINDOWS)
    dense = evaluate(opened.model, windows)
    say(f"Measuring {len(opened.layers)} layers ({', '.join(METRICS)}).")
    table = measure(opened.model, METRICS, batches=opened.batches, layers=opened.layers, facts=opened.facts)
    plans = {name: allocate(table, sparsity, allocator=name) for name in SHOWN_ALLOCATORS}
    perplexity, achieved = {}, {}
    for allocator, plan in plans.items():
        for criterion in SHOWN_CRITERIA:
            model = copy.deepcopy(opened.model)
            results = prune_(model, plan, criterion=criterion, batches=opened.batches)
            perplexity[allocator, criterion] = evaluate(model, windows).token_ppl
            achieved[allocator, criterion] = sum(r.zeros for r in results) / table.total
            say(f"{allocator} + {criterion}: perplexity {perplexity[allocator, criterion]:.2f}")
    demo = Demo(dense.token_ppl, perplexity, achieved, dense.tokens, LENGTH, table.total, output)
    _save_best(demo, plans, opened, request)
    _check(opened, output)
    return demo


def _is_demo(output: Path) -> bool:
    """Whether `output` is an earlier demo, which may be replaced; raises BillhookError where it holds anything else."""
    if not output.is_dir() or not any(output.iterdir()):
        return False
    record = history(output)
    if record is not None and record.steps[0].model.get("name") == MODEL.name:
        return True
    raise BillhookError(f"The output {output} is not empty and holds no earlier demo: choose another with --output.")


def _save_best(demo: Demo, plans: dict[str, Plan], opened: Opened, request: Request) -> None:
    """Run the best pair once more as an ordinary job, which writes model and record."""
    allocator, criterion = demo.best
    method = Method(criterion, CRITERIA.configure(criterion, {}))
    run(Job(replace(request, criterion=criterion, allocator=allocator), opened, plans[allocator], method))


@torch.no_grad()
def _check(opened: Opened, output: Path) -> None:
    """Verify the directory, and compare the logits of stock transformers with those of the model in memory, rounded to
    the dtype on disk; raises JobError for a difference."""
    result = verify(output)
    if not result.ok:
        raise JobError(f"The saved model does not verify: {result.problems[0]}")
    ids = torch.arange(3, 35)[None]
    with quiet():
        stock = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    on_disk = AutoConfig.from_pretrained(output).dtype
    for parameter in opened.model.parameters():
        parameter.copy_(parameter.to(on_disk))
    if not torch.equal(stock(ids).logits, opened.model(ids).logits):
        raise JobError(f"{output} gives other logits in stock transformers than in memory.")
