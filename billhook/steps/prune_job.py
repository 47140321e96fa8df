"""A request to prune a model, its checked job, what a run reports, and its step in billhook.json."""

import html
import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import LayerResult
from billhook.engine.method import Group, Method, Prefix, Rounding
from billhook.errors import BillhookError
from billhook.evaluation.quality import Loss, loss_json
from billhook.methods.sparse import CRITERIA
from billhook.plan import recipes
from billhook.plan.allocators import BudgetScope
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.recovery.blockwise import Refining
from billhook.steps.facts import computed_in, versions
from billhook.steps.inputs import ModelRequest, listed
from billhook.steps.record import left_alone, place, refilled_notes, without_folders
from billhook.steps.request import Opened, calibration_facts
from billhook.store.compute import dtype_name, stored_dtype
from billhook.store.record import Record, Step, append_step
from billhook.store.sinks import left_over


@dataclass(frozen=True)
class PruneRequest(ModelRequest):
    """The parameters of a pruning run, named as on the command line.

    `recipe` (by default `good`) fills in what is not given, see `billhook.plan.recipes`. With `published`, zeros are
    counted, and gradients accumulated, as in the papers' code, too.
    """

    sparsity: float | None = None
    recipe: str = ""
    criterion: str = ""
    allocator: str = ""
    pattern: str = "unstructured"
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: str | Path | Plan | None = None
    table: str | Path | Table | None = None
    gradients: str | Path | Gradients | None = None
    budget: BudgetScope = "each"
    group: Group | None = None
    refine: Refining | Literal[""] = ""
    prefix: Prefix | Literal[""] = ""
    pack: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        planned, structured = self.plan is not None, Pattern.parse(self.pattern).structured
        found = recipes.chosen(
            self.recipe, self.criterion, self.allocator, self.refine, structured=structured, planned=planned
        )
        filled = {key: getattr(found, key) for key in ("criterion", "allocator", "refine")}
        filled |= {"group": self.group or found.group, "prefix": self.prefix or found.prefix}
        filled |= {"options": {**found.options, **self.options}}
        if self.sparsity is None and not planned:
            filled["sparsity"] = found.sparsity
        self.__dict__.update(filled)  # of a frozen object, which nobody has yet

    @property
    def followed(self) -> str | None:
        """The recipe that the run follows unchanged; None for another method, or a given plan."""
        name = self.recipe or recipes.DEFAULT
        if self.plan is not None:
            return None
        own = PruneRequest(self.model, None, recipe=name, pattern=self.pattern)
        keys = ("criterion", "allocator", "refine", "options", "group", "prefix")
        same = all(getattr(own, key) == getattr(self, key) for key in keys)
        return name if same and own.sparsity in (None, self.sparsity) else None

    @property
    def rounding(self) -> Rounding:
        """How zeros are counted (`billhook.methods.masks`)."""
        return "floor" if self.published else "exact"


@dataclass(frozen=True)
class Job:
    """A checked request with its plan, ready to run."""

    request: PruneRequest
    opened: Opened
    plan: Plan
    method: Method
    gradients: Gradients | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    packed: Path | None = None  # the final, packed output; `request.output` is then the dense model
    begun: float = field(default_factory=time.perf_counter)  # when the request was read

    @property
    def steps(self) -> int:
        """The number of progress calls of `run`: one per layer, two where its gradients are computed first."""
        return len(self.opened.layers) * (1 if self.gradients or not self.method.gradient else 2)


@dataclass(frozen=True, repr=False)
class Report:
    """What a run did; `output` is None when nothing was written, `record` is the content of billhook.json."""

    plan: Plan
    layers: list[LayerResult]
    output: Path | None
    seconds: float
    warnings: list[str]
    record: dict[str, Any]

    @property
    def lost(self) -> Loss | None:
        """What the model has lost against the dense one on held-out text; None if it was not measured."""
        found = self.record["steps"][-1]["made_by"]["lost"]
        return None if found is None else Loss(**found)

    @property
    def better_recipe(self) -> str | None:
        """The next recipe that loses less, if there is one."""
        found: str | None = self.record["steps"][-1]["made_by"]["better_recipe"]
        return found

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that are zero now."""
        return sum(layer.zeros for layer in self.layers) / sum(layer.n for layer in self.layers)

    def __str__(self) -> str:
        done = f"{self.sparsity:.2%} of {sum(layer.n for layer in self.layers):,} weights removed"
        where = "in memory" if self.output is None else f"in {self.output}"
        return f"Report: {done}, {where}; {self.lost or 'what was lost was not measured'}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The report in a notebook: a sentence, and a row for each layer."""
        cells = [[html.escape(str(value)) for value in row.values()] for row in self._rows()]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
        head = "".join(f"<th>{name}</th>" for name in self._rows()[0])
        layers = f"<details><summary>{len(cells)} layers</summary><table><tr>{head}</tr>{body}</table></details>"
        return f"<p>{html.escape(str(self))}</p>{layers}"

    def to_dataframe(self) -> Any:
        """A pandas data frame with a row for each layer; raises BillhookError without pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise BillhookError("A data frame needs pandas: pip install pandas.") from None
        return pandas.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        keys = ("layer", "shape", "planned", "sparsity", "zeros", "error", "seconds")
        return [{key: getattr(layer, key) for key in keys} for layer in self.layers]

    def to_json(self) -> dict[str, Any]:
        """The content of `prune --json`."""
        return {
            "output": None if self.output is None else str(self.output),
            "sparsity": self.sparsity,
            "target": self.plan.target,
            "seconds": round(self.seconds, 3),
            "lost": loss_json(self.lost),
            "better_recipe": self.better_recipe,
            "warnings": self.warnings,
            "layers": {r.layer: {"sparsity": r.sparsity, "planned": r.planned, "zeros": r.zeros} for r in self.layers},
        }


def record(job: Job, results: Sequence[LayerResult], lost: Loss | None = None) -> dict[str, Any]:
    """The content of billhook.json after the job: the earlier steps of the model and this one."""
    before, layers = job.opened.history, left_alone(job.opened.history, job.opened)
    known, present = {} if before is None else before.layers, {layer.name: layer for layer in job.opened.layers}
    notes = {}
    for r in results:
        earlier = known.get(r.layer, {})
        notes[r.layer] = [*r.notes, *refilled_notes(earlier.get("zeros", 0) - r.zeros, earlier)]
        layers[r.layer] = _layer_record(r, notes[r.layer], earlier) | place(present[r.layer])
    return append_step(before, _step(job, notes, results, lost), layers).to_json()


def _step(job: Job, notes: Mapping[str, Sequence[str]], results: Sequence[LayerResult], lost: Loss | None) -> Step:
    """The job as a step of a record, with the `notes` of its layers."""
    request, opened = job.request, job.opened
    plan, fields = job.plan.to_json(), ("published", "prefix", "refine", "seed", "budget")
    if isinstance(plan["made_by"].get("options"), dict):
        plan["made_by"] = {**plan["made_by"], "options": without_folders(plan["made_by"]["options"])}
    papers = {"criterion": CRITERIA.paper(request.criterion), "allocator": job.plan.made_by.get("paper")}
    return Step(
        "prune",
        plan,
        {
            "lost": loss_json(lost),
            "better_recipe": recipes.better(request.criterion, job.plan, request.refine),
            "recipe": request.followed,
            "criterion": request.criterion,
            "criterion_options": without_folders(job.method.options),
            "group": request.group or CRITERIA.group(request.criterion),
            **{key: getattr(request, key) for key in fields},
            **computed_in(opened.model),
            **request.selection,
            "stacks": listed(request.stacks) or [opened.task.stacks],
            "calibration": calibration_facts(opened),
            "gradients": _gradients_record(job),
            "papers": papers,
            "versions": versions(),
        },
        opened.facts,
        [
            *(f"{name} is left out: no output of the model depends on it" for name in opened.dead.values()),
            *(f"{layer}: {note}" for layer, texts in notes.items() for note in texts),
            *_rounded(job, results),
            *_other_weights(job.plan, opened.facts),
            *_changed_since(opened.history, opened.facts),
            *left_over(opened.model, opened.source),
        ],
    )


def _gradients_record(job: Job) -> dict[str, Any] | None:
    """The gradients that the criterion read, and their calibration text; None if it reads none."""
    statistic = job.method.gradient
    if not statistic:
        return None
    made = calibration_facts(job.opened) if job.gradients is None else job.gradients.about.get("calibration")
    return {"statistic": statistic, "calibration": made}


def _rounded(job: Job, results: Sequence[LayerResult]) -> list[str]:
    """A note where updated weights are written in another dtype than that in which they were computed."""
    source, computed = job.opened.source, job.opened.model.dtype
    stored = None if source is None else stored_dtype(source)
    if stored in (None, computed) or not any(result.updated for result in results):
        return []
    assert stored is not None
    where = f"computed in {dtype_name(computed)} and are stored in {dtype_name(stored)}, the dtype of the source"
    return [f"Updated weights were {where}."]


def _other_weights(plan: Plan, model: Mapping[str, Any]) -> list[str]:
    """A note where the plan was made for other weights than those of `model`, such as before a fine-tuning."""
    measured = plan.made_by.get("model")
    if not isinstance(measured, dict) or model["digest"] is None or measured.get("digest") in (None, model["digest"]):
        return []
    return [f"The plan was made for the weights of {measured.get('name')}, which are not those of {model['name']}."]


def _changed_since(before: Record | None, model: Mapping[str, Any]) -> list[str]:
    """A note where the record of a model does not fit its weights."""
    if before is None or before.steps[-1].result in (None, model["digest"]):
        return []
    return [f"{model['name']} was changed after the last step of its billhook.json: its earlier steps may not hold."]


def _layer_record(result: LayerResult, notes: Sequence[str], before: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "shape": list(result.shape),
        "sparsity": result.planned,
        "zeros": result.zeros,
        "notes": list(notes),
        "error": result.error,
        "updated": result.updated or bool(before.get("updated")),
    }
