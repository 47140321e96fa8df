"""A request to train what a pruned model has left, its checked job, what a run reports, and its step in
billhook.json."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from billhook.architectures.layers import Layer
from billhook.architectures.sources import resolve
from billhook.engine.loop import LayerResult
from billhook.errors import BillhookError
from billhook.evaluation.quality import Loss, Reference, loss_json
from billhook.recovery.objectives import OBJECTIVES
from billhook.recovery.recipes import recipe
from billhook.recovery.training import State, TrainingSetup
from billhook.steps.facts import computed_in, versions
from billhook.steps.inputs import Inputs, ModelRequest, listed
from billhook.steps.record import left_alone, place
from billhook.steps.recover_source import Source
from billhook.steps.request import Opened, calibration_facts
from billhook.store.compute import chosen_device, chosen_dtype, dtype_name
from billhook.store.record import Record, Step, append_step

Tuned = Literal["kept+norms", "kept", "adapters"]
Saving = Literal["merged", "adapter"]
By = Literal["model", "block"]
RANK = 8
# Fields that must be equal for a run to be continued, those that change others first.
IDENTITY = ("by", "recipe", "objective", "tune", "rank", "save", "tokens", "budget", "rate", "length", "batch_size")
TOKENS = 102_400  # where neither tokens nor a time is given
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class RecoverRequest(Inputs):
    """The parameters of a training run; the field names are those of the command line.

    `tokens` are the tokens of text (or images) that are trained on, or `budget` is a time such as "10m", from which
    their number follows. `rate` is a share of each parameter's root mean square; without it, some race. `teacher` is
    the directory of the dense model, where the history does not lead to it. `batch_size` windows are a step. `targets`
    and `ignore` choose the layers that are trained. Adapters have a `rank`, and are merged or saved (`save`). The whole
    model is trained, or one block at a time is tuned (`by`). With `checkpointing`, blocks are computed
    again in the backward pass. With `fsdp`, the model and its teacher are sharded over the processes of torchrun
    (`billhook.recovery.sharding`). A `recipe` (`billhook.recovery.recipes`) fills in what is not given.
    """

    model: str | Path
    output: str | Path
    teacher: str | Path | None = None
    recipe: str = ""
    objective: str = ""
    tune: Tuned | Literal[""] = ""
    rank: int | None = None
    save: Saving = "merged"
    by: By = "model"
    checkpointing: bool = False
    fsdp: bool = False
    tokens: int | None = None
    budget: str | None = None
    rate: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by == "block":
            self._check_by_block()
        own: dict[str, Any] = {"tune": "kept+norms"} | ({} if self.by == "block" else {"objective": "kl+hidden"})
        own = recipe(self.recipe).fields() if self.recipe else own
        if self.tune and self.tune != own["tune"]:
            own.pop("rank", None)
        filled = {key: value for key, value in own.items() if not getattr(self, key)}
        self.__dict__.update(filled)  # of a frozen object, which nobody has yet
        if self.tune != "adapters" and (self.rank is not None or self.save == "adapter"):
            raise BillhookError("A rank and --save are for adapters: give --tune adapters too.")
        if self.rank is not None and self.rank < 1:
            raise BillhookError(f"The rank must be at least 1, got {self.rank}.")
        if self.tokens is not None and self.budget is not None:
            raise BillhookError("Give either --tokens or a time with --budget, not both.")
        if self.tokens is not None and self.tokens < 1:
            raise BillhookError(f"The number of tokens must be at least 1, got {self.tokens}.")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise BillhookError(f"The rate is a share of each parameter's size and above 0, got {self.rate}.")
        if self.batch_size is not None and self.batch_size < 1:
            raise BillhookError(f"The batch size must be at least 1, got {self.batch_size}.")

    def _check_by_block(self) -> None:
        """Raise BillhookError for options that have no effect where one block at a time is tuned."""
        own: dict[str, object] = {"--recipe": self.recipe, "--objective": self.objective, "--budget": self.budget}
        own |= {f"--set {name}": name for name in self.options}
        own |= {"--rate": self.rate, "--rank": self.rank, "--batch-size": self.batch_size}
        own |= {"--checkpointing": self.checkpointing, "--fsdp": self.fsdp, "--tune adapters": self.tune == "adapters"}
        if given := [name for name, value in own.items() if value not in (None, "", False)]:
            raise BillhookError(
                f"Options without effect where one block at a time is tuned: {', '.join(given)}. Leave them out."
            )

    @property
    def seconds(self) -> float | None:
        """The time of `budget` in seconds; raises BillhookError for one that cannot be read."""
        if self.budget is None:
            return None
        number, unit = self.budget[:-1], _UNITS.get(self.budget[-1:])
        try:
            found = float(number) * (unit or math.nan)
        except ValueError:
            found = math.nan
        if not 0 < found < math.inf:
            raise BillhookError(f"--budget {self.budget:.20} is no time: write 90s, 10m or 2h.")
        return found

    @property
    def windows(self) -> int | None:
        """The windows that are read once, as a recipe has them; None where tokens or a time are given."""
        return recipe(self.recipe).windows if self.recipe and self.tokens is None and self.budget is None else None

    def model_request(self) -> ModelRequest:
        """The model and the text to open."""
        found = self._model_request(targets=(), ignore=())
        if not self.fsdp:
            return found
        dtype = chosen_dtype(self.dtype, chosen_device(self.device), resolve(self.model))
        return replace(found, device="cpu", dtype=dtype_name(dtype))  # whole where it is opened


@dataclass(frozen=True)
class RecoverJob:
    """A checked request.

    `setup` is what is trained, of which `source`, `tokens` how much; `rate` is None where rates race. `reference`
    holds the dense model's predictions on text that is used for nothing else, `zeros` the zeros of each layer before.
    `adapted` is peft's model with adapters, where these are trained.
    """

    request: RecoverRequest
    opened: Opened
    setup: TrainingSetup
    source: Source
    tokens: int
    rate: float | None
    reference: Reference | None
    zeros: Mapping[str, int]
    identity: Mapping[str, Any]
    notes: list[str]
    adapted: Any = None

    @property
    def steps(self) -> int:
        """The number of progress calls of `run`: one for each step of a race and of the training."""
        races = len(self.setup.shares) * self.setup.race_steps if self.rate is None else 0
        return races + self.setup.steps


@dataclass(frozen=True)
class RecoverReport:
    """What a run did; `before` and `after` are the held-out losses, equal where nothing improved."""

    output: Path
    objective: str
    tokens: int
    rate: float
    races: Mapping[str, float | None]
    before: float
    after: float
    state: State
    zeros: int
    seconds: float
    lost_before: Loss | None
    loss: Loss | None
    warnings: list[str]

    @property
    def improved(self) -> bool:
        """Whether the model is better than it was; otherwise it has the bytes of the input."""
        return self.after < self.before

    def to_json(self) -> dict[str, Any]:
        """The content of `recover --json`."""
        return {
            "output": str(self.output),
            "improved": self.improved,
            "objective": self.objective,
            "tokens": self.tokens,
            "rate": self.rate,
            "races": dict(self.races),
            "steps": self.state.steps,
            "best_step": self.state.best,
            "held_out_before": self.before,
            "held_out_after": self.after,
            "zeros": self.zeros,
            "seconds": round(self.seconds, 3),
            "lost_before": loss_json(self.lost_before),
            "lost": loss_json(self.loss),
            "warnings": self.warnings,
        }


def teacher_facts(before: Record | None, digest: str | None) -> dict[str, Any] | None:
    """The dense model's name, where the history has it, and its digest; None without one."""
    if digest is None:
        return None
    return {"name": None if before is None else before.steps[0].model.get("name"), "digest": digest}


def zeros_of(layers: Sequence[Layer]) -> dict[str, int]:
    """The zeros of each layer."""
    return {layer.name: int((layer.weight == 0).sum()) for layer in layers}


def record(job: RecoverJob, report: RecoverReport) -> dict[str, Any]:
    """The content of billhook.json after the run."""
    request, opened, before = job.request, job.opened, job.opened.history
    zeros, layers = zeros_of(opened.layers), []
    for layer in opened.layers:
        result = LayerResult(
            layer.name, layer.shape, planned=0.0, zeros=zeros[layer.name], zeros_before=job.zeros[layer.name],
            notes=(), updated=report.improved,
        )  # fmt: skip
        layers.append(result)
    made_by: dict[str, Any] = {
        "objective": request.objective,
        "objective_options": OBJECTIVES.configure(request.objective, request.options),
        "recipe": request.recipe or None,
        "tune": request.tune,
        "rank": None if job.adapted is None else request.rank or RANK,
        "tokens": report.tokens,
        "budget": request.budget,
        "rate": report.rate,
        "races": dict(report.races),
        "steps": report.state.steps,
        "best_step": report.state.best if report.improved else 0,
        "held_out": {"before": report.before, "after": report.after},
        "zeros": dict(job.zeros),
        "seed": request.seed,
        **computed_in(job.setup.model),
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "teacher": teacher_facts(before, job.identity["teacher"]),
        "calibration": calibration_facts(opened),
        "papers": {"objective": OBJECTIVES.paper(request.objective)},
        "lost_before": loss_json(report.lost_before),
        "lost": loss_json(report.loss),
        "versions": versions(),
    }
    step = Step("recover", None, made_by, opened.facts, report.warnings)
    return append_step(before, step, trained_layers_of(opened, before, layers)).to_json()


def trained_layers_of(
    opened: Opened, before: Record | None, results: Sequence[LayerResult]
) -> dict[str, dict[str, Any]]:
    """The state of all recorded layers after a training of which `results` are the layers that it could change.

    A layer that no plan names has no sparsity.
    """
    known, layers = {} if before is None else before.layers, left_alone(before, opened)
    present = {layer.name: layer for layer in opened.layers}
    for r in results:
        facts = {"shape": list(r.shape), "error": None, "notes": [], **known.get(r.layer, {}), "zeros": r.zeros}
        facts |= {"updated": r.updated or bool(facts.get("updated"))}
        facts |= {"error": None} if r.updated else {}  # that of the layer as it was
        became = f"{r.zeros - r.zeros_before} weights became zero in the training"
        facts["notes"] = [*facts["notes"], *r.notes, *([became] if r.zeros > r.zeros_before else [])]
        # of quantized layers the place is known
        layers[r.layer] = facts | ({} if facts.get("type") else place(present[r.layer]))
    return layers
