"""`billhook prune`: a model directory in, a pruned model directory out."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from billhook import __version__
from billhook.cli import options as shared
from billhook.cli.common import (
    announce,
    duration,
    emit,
    graceful_interrupt,
    layers_per_block,
    parse_settings,
    progress,
    say,
    say_next,
    say_notes,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from billhook.architectures.layers import Layer
    from billhook.cli.events import Log
    from billhook.engine.loop import LayerResult
    from billhook.plan.plan import Plan
    from billhook.steps.estimate import Estimate
    from billhook.steps.prune import Job, Report
    from billhook.steps.prune_job import PruneRequest

NAME = "prune"
EXAMPLES = """\b
Examples:
  billhook prune model --sparsity 0.5 --calibration text.txt -o pruned
  billhook prune model --sparsity 0.6 --recipe best --calibration hub:c4 -o pruned
  billhook prune model --sparsity 0.7 --recipe alphapruning --set epsilon=0.2 --calibration hub:c4 -o pruned
  billhook prune model --pattern 2:4 --criterion sparsegpt --calibration t.jsonl -o pruned
  billhook prune model --plan plan.json --calibration text.txt -o pruned
  billhook prune model --sparsity 0.7 --calibration text.txt -o packed --pack
  billhook prune model --sparsity 0.5 --criterion magnitude --dry-run
"""
GRADIENTS_HELP = "A file of billhook gradients, for criteria that read them; otherwise they are computed first."
GROUP_HELP = "Compare weights within a row or the layer; by default as in the paper."
PREFIX_HELP = "Whose outputs are the inputs of the next block; dense is an option for image models.  [default: pruned]"
BUDGET_HELP = "With several stacks of blocks: each meets the sparsity, or all share it.  [default: each]"
DRY_RUN_HELP = "Show what would be pruned, the memory it needs, and its time, measured on a part; write nothing."


@dataclass(frozen=True)
class Method:
    """Which weights are removed."""

    sparsity: shared.Sparsity = None
    pattern: shared.Pattern = "unstructured"
    recipe: shared.Recipe = None
    criterion: shared.Criterion = None
    allocator: shared.Allocator = None
    settings: shared.Settings = None
    plan: Annotated[Path | None, typer.Option(help="A plan.json instead of sparsity and allocator.")] = None
    table: Annotated[Path | None, typer.Option(help="A table.json, so that nothing is measured again.")] = None
    gradients: Annotated[Path | None, typer.Option(help=GRADIENTS_HELP)] = None
    group: Annotated[Literal["row", "layer"] | None, typer.Option(help=GROUP_HELP)] = None
    prefix: Annotated[Literal["pruned", "dense"] | None, typer.Option(help=PREFIX_HELP)] = None
    budget: Annotated[Literal["each", "joint"] | None, typer.Option(help=BUDGET_HELP)] = None
    refine: Annotated[
        Literal["none", "blocks", "blocks+norms"] | None,
        typer.Option(help="Tune the remaining weights of each block (and its norms and biases)."),
    ] = None

    def fields(self) -> dict[str, Any]:
        """The fields of a `PruneRequest` that are given."""
        given = {key: value for key, value in vars(self).items() if value is not None and key != "settings"}
        return {**given, "options": parse_settings(self.settings)}


@dataclass(frozen=True)
class Writing(shared.Writing):
    """What is written, and where."""

    spill_gib: shared.SpillGib = 8.0
    pack: Annotated[bool, typer.Option("--pack", help="Write the result packed, as billhook pack does.")] = False


def command(
    model: shared.Model,
    *,
    output: Annotated[
        Path | None,
        shared.output_option("Directory of the pruned model; must be new or empty.  [required, but for --dry-run]"),
    ] = None,
    method: Method,
    text: shared.Text,
    work: shared.Work,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=DRY_RUN_HELP)] = False,
    writing: Writing,
    log_file: Annotated[Path | None, typer.Option(help="Log events to this file, one JSON object per line.")] = None,
    as_json: shared.Json = False,
) -> None:
    """Prune a model and write it as an ordinary Hugging Face directory."""
    from billhook.errors import BillhookError
    from billhook.steps.prune_job import PruneRequest

    if output is None and not dry_run:
        raise BillhookError(
            "Say where the pruned model goes: --output DIRECTORY (or --dry-run to see what would happen)."
        )
    groups = {**method.fields(), **vars(text), **work.fields(model), **vars(writing)}
    report = _prune(PruneRequest(model=model, output=output, **groups), log_file, dry_run, as_json)
    if report is None:
        return
    weights = sum(x.n for x in report.layers)
    say(f"{report.output}: {report.sparsity:.4%} of {weights:,} weights removed in {duration(report.seconds)}.")
    say(f"What was lost: {report.lost or 'not measured, because no text was read'}.")
    if report.better_recipe is not None:
        say(f"Less is lost with --recipe {report.better_recipe}.")
    assert report.output is not None
    say_next(report.output)
    if as_json:
        emit(report.to_json())


def _prune(request: "PruneRequest", log_file: Path | None, dry_run: bool, as_json: bool) -> "Report | None":
    """Check the request, announce what it needs, and run it, or print what it would do."""
    from billhook.cli.events import Log
    from billhook.distributed.collectives import distributed
    from billhook.steps.estimate import estimate
    from billhook.steps.prune import decide
    from billhook.steps.resolve import check
    from billhook.steps.sample_run import estimate_time

    with distributed(request.device), Log(log_file, request.resume) as log:
        resolved = check(request, dry_run=dry_run)
        needed = estimate_time(resolved) if dry_run else estimate(resolved)
        announce(needed, request.device)
        start = time.perf_counter()
        with progress("measuring") as advance:
            job = decide(resolved, advance)
        if dry_run:
            _show(job, needed, time.perf_counter() - start, as_json)
            return None
        return _run(job, needed, log)


def _run(job: "Job", needed: "Estimate", log: "Log") -> "Report":
    """Prune, and log every layer."""
    from billhook.steps.estimate import peak_gib
    from billhook.steps.prune import run
    from billhook.steps.state import finished_items

    request, layers = job.request, job.opened.layers
    log.event(
        "start", billhook=__version__, model=job.opened.facts, criterion=request.criterion,
        pattern=str(job.plan.pattern), target=job.plan.target, layers=len(layers),
        resume=request.resume, estimate=needed.to_json(),
    )  # fmt: skip

    def note(x: "LayerResult") -> None:
        seconds = round(x.seconds, 3)
        log.event("layer", layer=x.layer, sparsity=x.sparsity, planned=x.planned, error=x.error, layer_seconds=seconds)

    done = finished_items(request.output, request.resume)
    bar = progress("pruning", job.steps, unit=layers_per_block(layers), skipped=done)
    with bar as advance, graceful_interrupt() as stopping:
        report = run(job, advance, stopping, note)
    say_notes(report.warnings)
    for warning in report.warnings:
        log.event("warning", text=warning)
    peak = peak_gib()
    say(f"Peak memory: {peak:.2f} GiB (estimated {needed.memory_gib:.2f}).")
    log.event("end", output=str(report.output), sparsity=report.sparsity, took=report.seconds, peak_gib=peak)
    return report


def _show(job: "Job", needed: "Estimate", planning: float, as_json: bool) -> None:
    """Print what a dry run would prune; making its plan took `planning` seconds."""
    from billhook.architectures.layers import left_out

    layers, plan = job.opened.layers, job.plan
    if as_json:
        listed = {x.name: {"shape": list(x.shape), "sparsity": plan.sparsity[x.name]} for x in layers}
        estimate = {**needed.to_json(), "plan_seconds": round(planning, 1)}
        return emit({"layers": listed, "target": plan.target, "pattern": str(plan.pattern), "estimate": estimate})
    table("What would be pruned", ["layer", "out x in", "sparsity"], _collapsed(layers, plan))
    size = f"{len(layers)} layers, {sum(x.shape[0] * x.shape[1] for x in layers):,} weights"
    say(f"{size}, sparsity {plan.target:g}, pattern {plan.pattern}.")
    never = {re.sub(r"\.\d+\.", ".*.", name): reason for name, reason in left_out(job.opened.model).items()}
    for reason in sorted(set(never.values())):
        say(f"Never pruned ({reason}): {', '.join(name for name in never if never[name] == reason)}.")
    say(f"The plan took {duration(planning)} to make. Nothing was written.")


def _collapsed(layers: "Sequence[Layer]", plan: "Plan") -> list[list[str]]:
    """A row for each kind of layer where all of the kind are alike, and else for each layer."""
    kinds: dict[str, list[list[str]]] = {}
    for x in layers:
        kinds.setdefault(x.kind, []).append([x.name, f"{x.shape[0]} x {x.shape[1]}", f"{plan.sparsity[x.name]:.4f}"])
    rows = list[list[str]]()
    for kind, members in kinds.items():
        alike = len(members) > 1 and len({tuple(row[1:]) for row in members}) == 1
        rows += [[f"{kind}, {len(members)} layers", *members[0][1:]]] if alike else members
    return rows
