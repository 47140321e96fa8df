"""The main job: a model directory in, a pruned model directory out, in three steps: plan, check, apply.

`prepare` does everything that can fail because of what was asked (names, options, plan, data, output place) and changes nothing;
`run` applies the plan and writes the result. `prune` is both.
"""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import billhook
from billhook.allocators import ALLOCATORS, allocate, check_budget
from billhook.arch import Layer, find_layers
from billhook.criteria import CRITERIA
from billhook.errors import BillhookError
from billhook.gradient_file import Gradients, open_gradients
from billhook.gradients import compute_gradients
from billhook.measuring import measure
from billhook.metrics import fact
from billhook.options import split_options
from billhook.plan import Pattern, SparsityPlan, load_plan
from billhook.pruning import LayerResult, prune_
from billhook.request import Opened, Request, calibration_facts, listed, open_request
from billhook.save import save_pruned
from billhook.stats import GRADIENTS
from billhook.table import Table
from billhook.verification import VERSION


@dataclass(frozen=True)
class Job:
    """A checked request: nothing left to go wrong but the work itself."""

    request: Request
    opened: Opened
    plan: SparsityPlan
    criterion_options: dict[str, Any]
    gradients: Gradients | None = None

    @property
    def steps(self) -> int:
        """How often `run` reports progress: once a layer, and once before where its gradients are computed."""
        return len(self.opened.layers) * (1 if self.gradients or not _gradient(self.request, self.criterion_options) else 2)


@dataclass(frozen=True)
class Report:
    """What a run did. `output` is None when nothing was written (no output was asked for); `record` is billhook.json."""

    plan: SparsityPlan
    layers: list[LayerResult]
    output: Path | None
    seconds: float
    warnings: list[str]
    record: dict[str, Any]

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are zero now."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.n for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The same, for machines."""
        return {
            "output": None if self.output is None else str(self.output),
            "sparsity": self.sparsity,
            "target": self.plan.target,
            "seconds": round(self.seconds, 3),
            "warnings": self.warnings,
            "layers": {r.layer: {"sparsity": r.sparsity, "planned": r.planned, "zeros": r.zeros} for r in self.layers},
        }


def prune(model: str | Path | PreTrainedModel, *, progress: Callable[[str], None] = lambda layer: None, **fields: Any) -> Report:
    """Prune a model directory (or hub name), or a model in memory (in place), and write the result if `output` is given.

    The keyword arguments are the fields of `Request`: sparsity=0.7, criterion="wanda", allocator="alphapruning",
    epsilon=0.3, calibration="text.txt", output="pruned", ... Raises BillhookError (nothing changed) for what cannot be
    done as asked and JobError for a run that failed (nothing written).
    """
    known = Request.__dataclass_fields__
    options = {**(fields.get("options") or {}), **{key: value for key, value in fields.items() if key not in known}}
    request = Request(model, **{**{key: value for key, value in fields.items() if key in known}, "options": options})
    return run(prepare(request), progress)


def prepare(request: Request, progress: Callable[[str], None] = lambda layer: None) -> Job:
    """Check everything about a request, cheapest first; measure and allocate if the request asks for it."""
    allocators = [] if request.plan is not None else [request.allocator]
    criterion_options, given = split_options(request.options, request.criterion, allocators, Request.__dataclass_fields__)
    allocator_options = {} if request.plan is not None else ALLOCATORS.configure(request.allocator, given)
    plan = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
    table = Table.load(request.table) if isinstance(request.table, str | Path) else request.table
    if plan is None:
        check_budget(request.sparsity, Pattern.parse(request.pattern))
    elif table is not None or request.allocator != "uniform" or request.sparsity is not None or request.pattern != "unstructured":
        raise BillhookError("A plan already says how much each layer loses: leave out sparsity, pattern, allocator and table.")
    needed = () if plan or table else ALLOCATORS.needs(request.allocator, allocator_options)
    needs, gradients = CRITERIA.needs(request.criterion, criterion_options), _given_gradients(request, criterion_options)
    needs_text = any(gradients is None or name not in GRADIENTS for name in needs) or any(fact(name).needs_text for name in needed)
    opened = open_request(request, needs_text, f"Pruning with {request.criterion} and {request.allocator}")
    shapes = {layer.name: layer.shape for layer in opened.layers}
    if gradients is not None:
        gradients.check(_gradient(request, criterion_options), shapes, opened.facts)
    if plan is None:
        table = _measure(opened, needed, progress) if table is None else _rows(table, opened)
        plan = allocate(table, request.sparsity, allocator=request.allocator, pattern=request.pattern, **allocator_options)
    try:
        plan.check(shapes)
    except BillhookError as error:
        chosen = request.plan is not None and (request.targets or request.ignore)
        raise BillhookError(f"{error} --targets and --ignore must choose exactly the plan's layers." if chosen else str(error)) from None
    return Job(request, opened, plan, criterion_options, gradients)


def _gradient(request: Request, options: Mapping[str, Any]) -> str:
    """The statistic of gradients that the criterion reads, or an empty string."""
    return next((name for name in CRITERIA.needs(request.criterion, options) if name in GRADIENTS), "")


def _given_gradients(request: Request, options: Mapping[str, Any]) -> Gradients | None:
    if request.gradients is None:
        return None
    if not _gradient(request, options):
        raise BillhookError(f"The criterion {request.criterion} reads no gradients: leave --gradients out, or take criterion gblm.")
    return request.gradients if isinstance(request.gradients, Gradients) else open_gradients(Path(request.gradients))


def run(job: Job, progress: Callable[[str], None] = lambda layer: None) -> Report:
    """Apply a prepared job: prune in place, check, write."""
    start = time.perf_counter()
    request, opened = job.request, job.opened
    results = prune_(
        opened.model,
        job.plan,
        criterion=request.criterion,
        batches=opened.batches,
        layers=opened.layers,
        group=request.group,
        rounding=request.rounding,
        gradients=job.gradients,
        progress=progress,
        **job.criterion_options,
    )
    made = record(job, results)
    warnings = list(made["warnings"])
    output = None
    if request.output is not None:
        saved = save_pruned(opened.model, opened.source, Path(request.output), record=made, overwrite=request.overwrite)
        output = saved.path
        warnings += [saved.note] if saved.note else []
    return Report(job.plan, results, output, time.perf_counter() - start, warnings, made)


def measure_model(request: Request, metrics: Sequence[str], progress: Callable[[str], None] = lambda layer: None) -> Table:
    """Measure the layers of a request's model; text is read only if a metric looks at activations."""
    activations = [name for name in metrics if fact(name).needs_text]
    return _measure(open_request(request, bool(activations), f"The metric {' and '.join(activations)}"), metrics, progress)


def make_gradients(
    request: Request, statistic: str, path: Path, spill_gib: float = 8.0, progress: Callable[[str], None] = lambda layer: None
) -> Gradients:
    """Accumulate the gradients of a request's model on its calibration text and write them to `path`; see `compute_gradients`."""
    opened = open_request(request, True, "A gradient")
    facts = {"model": opened.facts, "calibration": calibration_facts(opened)}
    layers, batches = opened.layers, opened.batches
    return compute_gradients(opened.model, batches, statistic, path, layers=layers, facts=facts, spill_gib=spill_gib, progress=progress)


def _rows(table: Table, opened: Opened) -> Table:
    """The rows of a given table for the layers to prune; a table of the whole model serves for any part of it."""
    return table.only({layer.name for layer in opened.layers}, {layer.name: layer.shape for layer in find_layers(opened.model)})


def _measure(opened: Opened, metrics: Sequence[str], progress: Callable[[str], None]) -> Table:
    facts = opened.facts
    table = measure(opened.model, metrics, batches=opened.batches, layers=opened.layers, facts=facts, progress=progress)
    if opened.calibration is not None:
        table.made_by["calibration"] = calibration_facts(opened)
    return table


def record(job: Job, results: Sequence[LayerResult]) -> dict[str, Any]:
    """The content of billhook.json: the same inputs and seed give the same bytes, so there is no date and no duration in it."""
    request, opened = job.request, job.opened
    places = {layer.name: layer for layer in opened.layers}
    model = opened.facts
    return {
        "version": VERSION,
        "billhook": billhook.__version__,
        "plan": job.plan.to_json(),
        "layers": {result.layer: _layer_record(result, places[result.layer]) for result in results},
        "warnings": [*(f"{r.layer}: {note}" for r in results for note in r.notes), *_other_weights(job.plan, model)],
        "made_by": {
            "criterion": request.criterion,
            "criterion_options": job.criterion_options,
            "group": request.group or CRITERIA.group(request.criterion),
            "rounding": request.rounding,
            "seed": request.seed,
            "dtype": request.dtype,
            "device": request.device,
            "targets": listed(request.targets),
            "ignore": listed(request.ignore),
            "calibration": None if opened.calibration is None else calibration_facts(opened),
            "gradients": _gradients_record(job),
            "model": model,
            "papers": {"criterion": CRITERIA.paper(request.criterion), "allocator": job.plan.made_by.get("paper")},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        },
    }


def _gradients_record(job: Job) -> dict[str, Any] | None:
    """Which gradients the criterion read and the text they come from; None if it reads none."""
    statistic = _gradient(job.request, job.criterion_options)
    if not statistic:
        return None
    made = calibration_facts(job.opened) if job.gradients is None else job.gradients.about.get("calibration")
    return {"statistic": statistic, "calibration": made}


def _other_weights(plan: SparsityPlan, model: Mapping[str, Any]) -> list[str]:
    """A note where the plan comes from a table of other weights than those of `model` (a fine-tuned relative, say)."""
    measured = plan.made_by.get("model")
    if not isinstance(measured, dict) or model["digest"] is None or measured.get("digest") in (None, model["digest"]):
        return []
    return [f"The plan was made for the weights of {measured.get('name')}, which are not those of {model['name']}."]


def _layer_record(result: LayerResult, layer: Layer) -> dict[str, Any]:
    tensor = f"{layer.name}.weight" if layer.expert is None else layer.name.rpartition(".")[0]
    return {
        "shape": list(result.shape),
        "sparsity": result.planned,
        "zeros": result.zeros,
        "tensor": tensor,
        "index": layer.expert,
        "transposed": layer.transposed,
        "notes": list(result.notes),
    }
