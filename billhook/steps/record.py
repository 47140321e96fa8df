"""A checked job, what it did, and the step that this adds to billhook.json."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from billhook.architectures.layers import Layer, find_layers
from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import LayerResult, Method
from billhook.methods.sparse import CRITERIA
from billhook.plan.plan import Plan
from billhook.steps.request import Opened, Request, calibration_facts, listed
from billhook.store.record import REFILLED, Record, Step, append_step, located


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


def record(job: Job, results: Sequence[LayerResult], **made_by: Any) -> dict[str, Any]:
    """The content of billhook.json after the job: the steps of the model that was pruned, if it has a record, and this
    one, of which `made_by` are further facts."""
    before = job.opened.history
    known = {} if before is None else before.layers
    present = {layer.name: layer for layer in find_layers(job.opened.model)}
    notes = {result.layer: [*result.notes, *_refilled(result, known.get(result.layer))] for result in results}
    layers = {name: _left_alone(facts) | _place(present[name]) for name, facts in known.items() if name in present}
    layers |= {r.layer: _layer_record(r, notes[r.layer]) | _place(present[r.layer]) for r in results}
    return append_step(before, prune_step(job, notes, **made_by), layers).to_json()


def prune_step(job: Job, notes: Mapping[str, Sequence[str]], **made_by: Any) -> Step:
    """What the job does, as a step of a record; `notes` are those of its layers."""
    request, opened = job.request, job.opened
    plan = job.plan.to_json()
    if isinstance(plan["made_by"].get("options"), dict):
        plan["made_by"] = {**plan["made_by"], "options": _without_folders(plan["made_by"]["options"])}
    papers = {"criterion": CRITERIA.paper(request.criterion), "allocator": job.plan.made_by.get("paper")}
    packages = {"torch": torch.__version__, "transformers": transformers.__version__}
    return Step(
        "prune",
        plan,
        {
            "criterion": request.criterion,
            "criterion_options": _without_folders(job.method.options),
            "group": request.group or CRITERIA.group(request.criterion),
            **{key: getattr(request, key) for key in ("published", "refine", "seed", "dtype", "device")},
            "targets": listed(request.targets),
            "ignore": listed(request.ignore),
            "calibration": None if opened.samples is None else calibration_facts(opened),
            "gradients": _gradients_record(job),
            "papers": papers,
            "versions": {"python": platform.python_version(), **packages},
            **made_by,
        },
        opened.facts,
        [
            *(f"{layer}: {note}" for layer, said in notes.items() for note in said),
            *_other_weights(job.plan, opened.facts),
            *_changed_since(opened.history, opened.facts),
        ],
    )


def _without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they may be published: of a file its name alone."""
    text = {key: value for key, value in options.items() if isinstance(value, str)}
    paths = [key for key, value in text.items() if key == "file" or value.startswith(("/", "~"))]
    return {key: Path(value).name if key in paths else value for key, value in options.items()}


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


def _changed_since(before: Record | None, model: Mapping[str, Any]) -> list[str]:
    """A note where the record of a model is not of the weights that it has."""
    if before is None or before.steps[-1].result in (None, model["digest"]):
        return []
    return [f"{model['name']} was changed after the last step of its billhook.json: its earlier steps may not hold."]


def _left_alone(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a layer that the step does not change; its zeros are counted when it is written."""
    return {key: value for key, value in facts.items() if key != "zeros" or not located(facts)}


def _refilled(result: LayerResult, before: Mapping[str, Any] | None) -> list[str]:
    """A note where a layer has fewer zeros than before, and such notes of earlier steps.

    A criterion that updates the weights it keeps fills zeros where it is asked for less than was removed before.
    """
    if before is None:
        return []
    lost = before["zeros"] - result.zeros
    earlier = [note for note in before.get("notes", ()) if note.endswith(REFILLED)]
    return [*earlier, *([f"{lost} {REFILLED}"] if lost > 0 else [])]


def _layer_record(result: LayerResult, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "shape": list(result.shape),
        "sparsity": result.planned,
        "zeros": result.zeros,
        "notes": list(notes),
        "error": result.error,
    }


def _place(layer: Layer) -> dict[str, Any]:
    """Where a layer lies in memory, from which `billhook.store.sinks` finds its place on disk."""
    tensor = f"{layer.name}.weight" if layer.expert is None else layer.name.rpartition(".")[0]
    return {"tensor": tensor, "index": layer.expert, "transposed": layer.transposed}
