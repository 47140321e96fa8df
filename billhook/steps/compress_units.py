"""One size for units and bits: some units go, and what stays is quantized, where that is measured to lose less.

    for each share of `SHARES`: slim -> types for the same bytes -> predicted loss -> the best, against bits alone

Without units and with each share of the parameters in blocks removed, the types for the budget are chosen as in
`billhook.steps.compress`. The predicted loss is the measured KL divergence of the smaller model from the dense one,
plus what its types are predicted to lose. If units are predicted to pay, the best share and bits alone are both
quantized, and the one with the smaller divergence from the dense model on held-out windows is kept: the result is never
worse than bits alone there. Where bits alone cannot meet the size, only units can.

Everything is written in OUTPUT.units, which is deleted when the output is in its place, and from which an interrupted
run goes on. Cost: for each share a run of `slim` and of the measurement of types, and at most two quantizations; on the
disk the smaller models.

Limits: the sum is a prediction for small losses; kinds of units are those given, removed in equal parts everywhere.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from billhook.ambient import pinned
from billhook.architectures.units import find_units
from billhook.engine.walk import Progress
from billhook.errors import BillhookError, JobError
from billhook.evaluation.scoring import recorded_divergence
from billhook.plan.front import measured_levels
from billhook.plan.level_allocators import ERRORS
from billhook.plan.levels import types_of
from billhook.plan.plan import Plan
from billhook.reports.quantized_card import publish_quantized
from billhook.steps.allocation import Allocation
from billhook.steps.compress import CompressJob, CompressReport, CompressRequest, check, decide, run_compress
from billhook.steps.inputs import Inputs
from billhook.steps.lost import Lost, loss_of
from billhook.steps.quantize import open_blocks
from billhook.steps.quantize_job import QuantizeReport
from billhook.steps.request import Opened, check_text_given, draw_text, identity
from billhook.steps.saved_levels import resume_advice
from billhook.steps.sizes import Size, TooSmall
from billhook.steps.slim import prepare as prepare_slim
from billhook.steps.slim import run as run_slim
from billhook.steps.slim_job import SlimRequest
from billhook.steps.slim_plan import kinds_of
from billhook.steps.state import check_same_run
from billhook.store.files import json_text, read_json, write_json
from billhook.store.layout import RECORD
from billhook.store.output import absolute, check_output, put_in_place
from billhook.store.record import read_record
from billhook.tasks.self_text import is_self

SHARES = (0.125, 0.25)  # of the parameters in blocks
_ASKED, _AGAIN = "request.json", "continue with the same command and --resume"


@dataclass(frozen=True)
class Candidate:
    """A share of the parameters in blocks that goes, 0 for bits alone, and how the rest is quantized into `output`.

    `units` is the KL divergence of the smaller model from the dense one, `bits` what its types are predicted to lose.
    There is no `job` where the output is there already.
    """

    share: float
    output: Path
    job: CompressJob | None
    units: float
    bits: float

    @property
    def predicted(self) -> float:
        """What is lost in all."""
        return self.units + self.bits


@dataclass(frozen=True)
class UnitsJob:
    """A checked request with its candidates, and the dense model's predictions on the held-out windows."""

    request: CompressRequest
    candidates: Sequence[Candidate]
    budget: int
    source: Path
    lost: Lost
    notes: list[str]

    @property
    def best(self) -> Candidate:
        """The candidate that is predicted to lose least; of equal ones that with the least removed."""
        return min(self.candidates, key=lambda c: (c.predicted, c.share))


@dataclass(frozen=True)
class UnitsReport:
    """What a run did: the share that was removed, what was predicted for each, and the measured divergences."""

    quantized: QuantizeReport
    budget: int
    share: float
    predicted: Mapping[float, float]
    measured: Mapping[float, float]

    def to_json(self) -> dict[str, Any]:
        """The content of `compress --units --json`."""
        units = {"share": self.share, "predicted": _finite(self.predicted), "measured": _finite(self.measured)}
        return {**self.quantized.to_json(), "budget": self.budget, "units": units}


@pinned
def compress(
    model: str | Path, output: str | Path, *, progress: Progress = lambda line: None, **fields: Any
) -> CompressReport | UnitsReport:
    """Compress a model directory (or hub name) to a size; the keyword arguments are the fields of `CompressRequest`,
    and options of GPTQ.

    With `units`, some of them may go, too. Raises BillhookError (nothing written) for an impossible request, with the
    least possible size where that is the reason, and JobError for a run that failed.
    """
    request = CompressRequest.given(model=model, output=output, **fields)
    if request.units:
        return run_units(prepare_units(request, progress), progress)
    return run_compress(decide(check(request, progress), progress), progress)


def prepare_units(request: CompressRequest, progress: Progress = lambda line: None) -> UnitsJob:
    """Check a request, remove units at every share, and choose the types of each; raises as `slim` and `compress`."""
    output, kinds = _checked(request), kinds_of(request.units)
    opened = open_blocks(request.quantizing())
    budget = _budget(request, opened)
    find_units(opened.model, [kind for kind in kinds if kind != "blocks"])
    drawn = draw_text(opened, request.quantizing().model_request(), progress)
    assert drawn.source is not None
    asked = {**_asked(request), **identity(request.quantizing().model_request(), drawn, request.options, None)}
    folder = _begin(request, output, json.loads(json_text(asked)))
    lost = loss_of(drawn, request.drawing.held_out)
    problems, candidates = dict[float, BillhookError](), list[Candidate]()
    try:
        for share in (0.0, *SHARES):
            try:
                with resume_advice(folder, _AGAIN):
                    candidates.append(_candidate(request, kinds, share, budget, folder / f"share-{share:g}", progress))
            except BillhookError as problem:
                if isinstance(problem, JobError) or not (share or isinstance(problem, TooSmall)):
                    raise  # that other shares would not mend
                problems[share] = problem
        if not candidates:  # the last has the least to store
            raise next(x for x in reversed(problems.values()) if isinstance(x, TooSmall))
    except JobError:
        raise
    except BillhookError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    notes = [f"With {share:.1%} of the parameters in blocks removed: {problem}" for share, problem in problems.items()]
    return UnitsJob(request, candidates, budget, drawn.source, lost, notes)


def run_units(
    job: UnitsJob, progress: Progress = lambda line: None, stopping: Callable[[], bool] = lambda: False
) -> UnitsReport:
    """Quantize bits alone and the best candidate, and keep the better one; raises as `billhook.steps.quantize.run`."""
    tried = [c for c in job.candidates if not c.share or c is job.best]
    output = absolute(job.request.output)
    with resume_advice(_folder(output), _AGAIN):
        losses = {c.share: _carried_out(c, job.lost, progress, stopping) for c in tried}
    best = min(tried, key=lambda c: (losses[c.share], c.share))
    predicted = {c.share: c.predicted for c in job.candidates}
    _record(best, predicted, losses)
    put_in_place(best.output, output)
    shutil.rmtree(_folder(output), ignore_errors=True)
    return UnitsReport(QuantizeReport.of(output, job.source), job.budget, best.share, predicted, losses)


def discard(job: UnitsJob) -> None:
    """Delete what was written for a job that is not carried out."""
    shutil.rmtree(_folder(absolute(job.request.output)), ignore_errors=True)


def _checked(request: CompressRequest) -> Path:
    """The output, once it is certain that the request can be carried out with units."""
    allocation = Allocation.of(request.allocator, request.options, request.levels)
    if allocation.file or ERRORS not in allocation.needs or request.levels is not None:
        what = "With --units, losses are predicted from measured levels"
        raise BillhookError(f"{what}: use --allocator curves, rco or auto, and no --levels.")
    if kinds_of(request.units) == ["auto"]:
        raise BillhookError("Name the kinds of units that may go with the bits, such as --units experts,channels.")
    if request.calibration is not None and is_self(request.calibration):
        raise BillhookError("With --units, models of several sizes are compared on one text: give a text or tokens.")
    check_text_given(request, True, "Removing units")
    return check_output(absolute(request.output), overwrite=request.overwrite)


def _asked(request: CompressRequest) -> dict[str, Any]:
    keys = ("size", "bits", "ratio", "fit", "context", "target", "types", "allocator", "units", "split_size")
    return {key: getattr(request, key) for key in keys}


def _folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.units")


def _begin(request: CompressRequest, output: Path, asked: Mapping[str, Any]) -> Path:
    """The folder of the run, empty or with what an interrupted run left; raises BillhookError for another run's."""
    folder = _folder(output)
    if folder.exists():
        if not (folder / _ASKED).is_file():
            raise BillhookError(f"{folder}, where smaller models would be written, is not from a run: move it away.")
        if request.resume:
            check_same_run(read_json(folder / _ASKED, "request"), asked, folder)
            return folder
        if not request.overwrite:
            raise BillhookError(
                f"{folder} holds an unfinished run. Continue it with --resume, or start again with --overwrite."
            )
        shutil.rmtree(folder)
    folder.mkdir()
    write_json(folder / _ASKED, dict(asked))
    return folder


def _budget(request: CompressRequest, opened: Opened) -> int:
    """The bytes of the result."""
    stream = opened.resources.stream
    assert stream is not None
    given = Size(request.size, request.bits, request.ratio, request.fit, request.context)
    given.check(request.target)
    parameters = sum(math.prod(stored.entry.shape) for stored in stream.source.values())
    return given.budget(opened.model.config, parameters)[0]


def _candidate(
    request: CompressRequest, kinds: Sequence[str], share: float, budget: int, folder: Path, progress: Progress
) -> Candidate:
    """A share of the parameters removed, and types for the rest."""
    model, units = _slimmed(request, kinds, share, folder, progress) if share else (request.model, 0.0)
    output = folder / "bits" / Path(request.output).name
    output.parent.mkdir(parents=True, exist_ok=True)
    if (output / RECORD).is_file():
        plan = Plan.from_json(read_record(output / RECORD).steps[-1].plan or {}, RECORD)
        return Candidate(share, output, None, units, _predicted(plan))
    again = replace(
        request, model=model, output=output, resume=True, overwrite=False,
        size=budget, bits=None, ratio=None, fit=None, context=None, units=(),
    )  # fmt: skip
    job = decide(check(again, progress), progress)
    found = Candidate(share, output, job, units, _predicted(job.quantizing.plan))
    progress(f"{share:.1%} of the parameters in blocks removed: predicted divergence {found.predicted:.4f}")
    return found


def _slimmed(
    request: CompressRequest, kinds: Sequence[str], share: float, folder: Path, progress: Progress
) -> tuple[Path, float]:
    """The model without a share of the parameters in its blocks, and its divergence from the dense one."""
    model = folder / "slim" / Path(str(request.model)).name
    if not (model / RECORD).is_file():
        model.parent.mkdir(parents=True, exist_ok=True)
        same = {name: getattr(request, name) for name in Inputs.__dataclass_fields__}
        given = SlimRequest(request.model, model, share, kinds, **{**same, "resume": True, "overwrite": False})
        run_slim(prepare_slim(given, progress), progress)
    return model, _divergence(model)


def _divergence(folder: Path) -> float:
    """What the last step of a directory lost, as it recorded; infinite where it did not."""
    far = recorded_divergence(read_record(folder / RECORD).steps[-1].made_by.get("lost") or {})
    return math.inf if far is None else float(far)


def _predicted(plan: Plan) -> float:
    """The sum of what all tensors are predicted to lose with the types of a plan."""
    types = types_of(plan)
    return math.fsum(m.weight * m.types[types[name]].error for name, m in measured_levels(plan).items())


def _carried_out(candidate: Candidate, lost: Lost, progress: Progress, stopping: Callable[[], bool]) -> float:
    """Quantize a candidate, unless that is done; returns its divergence from the dense model."""
    if candidate.job is not None:
        run_compress(candidate.job, progress, stopping, lost=lost)
    return _divergence(candidate.output)


def _record(best: Candidate, predicted: Mapping[float, float], losses: Mapping[float, float]) -> None:
    """Add to the last step's plan what was tried."""
    path = best.output / RECORD
    value = read_json(path, "record")
    tried = {"share": best.share, "predicted": _finite(predicted), "measured": _finite(losses)}
    value["steps"][-1]["plan"]["made_by"]["units"] = tried
    write_json(path, value)
    publish_quantized(best.output)


def _finite(losses: Mapping[float, float]) -> dict[str, float | None]:
    """Losses by share, for json: null for one that is not finite."""
    return {f"{share:g}": loss if math.isfinite(loss) else None for share, loss in losses.items()}
