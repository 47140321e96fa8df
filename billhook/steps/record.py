"""A checked job, what it did, and what of that is written to billhook.json."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import billhook
from billhook.architectures.layers import Layer
from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import LayerResult, Method
from billhook.methods.sparse import CRITERIA
from billhook.plan.plan import Plan
from billhook.steps.request import Opened, Request, calibration_facts, listed
from billhook.steps.verify import VERSION


@dataclass(frozen=True)
class Job:
    """A checked request: nothing left to go wrong but the work itself."""

    request: Request
    opened: Opened
    plan: Plan
    method: Method
    gradients: Gradients | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    packed: Path | None = None  # where the result goes packed; `request.output` is then a place beside it

    @property
    def steps(self) -> int:
        """How often `run` reports progress: once a layer, and once before where its gradients are computed."""
        return len(self.opened.layers) * (1 if self.gradients or not self.method.gradient else 2)


@dataclass(frozen=True)
class Report:
    """What a run did. `output` is None when nothing was written (no output was asked for); `record` is
    billhook.json."""

    plan: Plan
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


def record(job: Job, results: Sequence[LayerResult]) -> dict[str, Any]:
    """The content of billhook.json: the same inputs and seed give the same bytes, so there is no date and no duration
    in it."""
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
            "criterion_options": dict(job.method.options),
            "group": request.group or CRITERIA.group(request.criterion),
            "published": request.published,
            "refine": request.refine,
            "seed": request.seed,
            "dtype": request.dtype,
            "device": request.device,
            "targets": listed(request.targets),
            "ignore": listed(request.ignore),
            "calibration": None if opened.samples is None else calibration_facts(opened),
            "gradients": _gradients_record(job),
            "model": model,
            "papers": {"criterion": CRITERIA.paper(request.criterion), "allocator": job.plan.made_by.get("paper")},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    }


def _gradients_record(job: Job) -> dict[str, Any] | None:
    """Which gradients the criterion read and the text they come from; None if it reads none."""
    statistic = job.method.gradient
    if not statistic:
        return None
    made = calibration_facts(job.opened) if job.gradients is None else job.gradients.about.get("calibration")
    return {"statistic": statistic, "calibration": made}


def _other_weights(plan: Plan, model: Mapping[str, Any]) -> list[str]:
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
        "error": result.error,
    }
