"""`billhook prune`: a model directory in, a pruned model directory out."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from billhook import __version__
from billhook.cli.common import (
    Json,
    Preset,
    Settings,
    TrustRemoteCode,
    announce,
    duration,
    emit,
    graceful_interrupt,
    handle_errors,
    layers_a_block,
    parse_settings,
    progress,
    say,
    table,
)
from billhook.cli.groups import Text, Work, grouped

if TYPE_CHECKING:
    from billhook.cli.events import Log
    from billhook.engine.loop import LayerResult
    from billhook.steps.prune import Job, Report
    from billhook.steps.resolve import ResolvedRequest

NAME = "prune"
EXAMPLES = """\b
Examples:
  billhook prune model --sparsity 0.5 --calibration text.txt -o pruned
  billhook prune model --sparsity 0.7 --allocator alphapruning --set epsilon=0.2 --calibration hub:c4 -o pruned
  billhook prune model --pattern 2:4 --criterion sparsegpt --calibration t.jsonl -o pruned
  billhook prune model --plan plan.json --calibration text.txt -o pruned
  billhook prune model --sparsity 0.7 --calibration text.txt -o packed --pack
  billhook prune model --sparsity 0.5 --criterion magnitude --dry-run
"""


@handle_errors
@grouped
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the pruned model goes; must be new or empty.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the prunable weights to remove, in [0, 1).")
    ] = None,
    pattern: Annotated[
        str, typer.Option(help="unstructured, or N:M (keep N of every M), such as 2:4.")
    ] = "unstructured",
    criterion: Annotated[str, typer.Option(help="Which weights go: see billhook ls criteria.")] = "wanda",
    allocator: Annotated[
        str | None,
        typer.Option(
            help="How much each layer loses: billhook ls allocators, or auto; uniform unless a preset or plan is given."
        ),
    ] = None,
    settings: Settings = None,
    preset: Preset = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json instead of sparsity and allocator.")] = None,
    table_file: Annotated[
        Path | None, typer.Option("--table", help="A table.json, so that nothing is measured again.")
    ] = None,
    gradients: Annotated[
        Path | None,
        typer.Option(help="A file of billhook gradients, for criteria that read them; else they are computed first."),
    ] = None,
    group: Annotated[
        Literal["row", "layer"] | None,
        typer.Option(help="Weights compete within a row or the layer; by default as in the paper."),
    ] = None,
    rounding: Annotated[
        Literal["exact", "floor"], typer.Option(help="exact meets the budget; floor counts as the published code does.")
    ] = "exact",
    refine: Annotated[
        Literal["none", "blocks", "blocks+norms"],
        typer.Option(help="Tune what is left of each block (and its norms and biases)."),
    ] = "none",
    text: Text,
    work: Work,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be pruned, the memory it needs, and its time, measured on a part; write nothing.",
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists, or an unfinished run.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run after its last finished block.")
    ] = False,
    spill_gib: Annotated[
        float, typer.Option(help="Hidden states beyond this many GiB go to disk (TMPDIR).", min=0)
    ] = 8.0,
    pack: Annotated[bool, typer.Option("--pack", help="Write the result packed, as billhook pack does.")] = False,
    log_file: Annotated[Path | None, typer.Option(help="Write what happens here, one JSON object a line.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Prune a model and write it as an ordinary Hugging Face directory."""
    from billhook.cli.events import Log
    from billhook.distributed.collectives import distributed
    from billhook.errors import BillhookError
    from billhook.plan.allocators import presets
    from billhook.steps.prune import Request
    from billhook.steps.resolve import check

    if output is None and not dry_run:
        raise BillhookError(
            "Say where the pruned model goes: --output DIRECTORY (or --dry-run to see what would happen)."
        )
    options = dict[str, Any](parse_settings(settings))
    if preset is not None:
        if plan is not None:
            raise BillhookError("A plan already says how much each layer loses: leave out --preset or --plan.")
        allocator, sparsity, options = presets.apply(preset, allocator, sparsity, options)
    request = Request(
        model=model, sparsity=sparsity, output=output, criterion=criterion, allocator=allocator or "uniform",
        pattern=pattern, options=options, plan=plan, table=table_file, gradients=gradients, group=group,
        rounding=rounding, refine=refine, **vars(text), **work.fields(), overwrite=overwrite, resume=resume,
        spill_gib=spill_gib, pack=pack, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with distributed(work.device), Log(log_file, resume) as log:
        resolved = check(request, dry_run=dry_run)
        if dry_run:
            _show(resolved, as_json)
            return
        report = _run(resolved, log)
    say(
        f"{report.output}: {report.sparsity:.4%} of {sum(x.n for x in report.layers):,} weights removed in "
        f"{report.seconds:.1f} s."
    )
    say(f"Check it: billhook verify {report.output}   Score it: billhook eval {report.output} --data SOURCE")
    if as_json:
        emit(report.to_json())


def _decided(resolved: "ResolvedRequest") -> "Job":
    """The job with its plan."""
    from billhook.steps.prune import decide

    with progress("measuring") as advance:
        return decide(resolved, advance)


def _run(resolved: "ResolvedRequest", log: "Log") -> "Report":
    """Prune, with every step in the log."""
    from billhook.steps.estimate import estimate, peak_gib
    from billhook.steps.prune import run

    needed = estimate(resolved)
    announce(needed, resolved.request.device)
    job = _decided(resolved)
    request, opened = job.request, job.opened
    method = {"criterion": request.criterion, "pattern": str(job.plan.pattern), "target": job.plan.target}
    facts = {"model": opened.facts, **method, "layers": len(opened.layers), "resume": request.resume}
    log.event("start", billhook=__version__, **facts, estimate=needed.to_json())

    def note(x: "LayerResult") -> None:
        result = {"layer": x.layer, "sparsity": x.sparsity, "planned": x.planned, "error": x.error}
        log.event("layer", **result, layer_seconds=round(x.seconds, 3))

    unit, before = layers_a_block(opened.layers), sum(layer.block < resolved.done for layer in opened.layers)
    with progress("pruning", job.steps, unit=unit, skipped=before) as advance, graceful_interrupt() as stopping:
        report = run(job, advance, stopping, note)
    for warning in report.warnings:
        say(f"note: {warning}")
        log.event("warning", text=warning)
    peak = peak_gib()
    say(f"Peak memory: {peak:.2f} GiB (estimated {needed.memory_gib:.2f}).")
    log.event("end", output=str(report.output), sparsity=report.sparsity, took=report.seconds, peak_gib=peak)
    return report


def _show(resolved: "ResolvedRequest", as_json: bool) -> None:
    """Print the dry run: one row a layer."""
    from billhook.steps.sample_run import estimate_time

    needed = estimate_time(resolved)
    announce(needed, resolved.request.device)
    begun = time.perf_counter()
    job = _decided(resolved)
    planning = time.perf_counter() - begun
    layers = job.opened.layers
    if as_json:
        listed = {x.name: {"shape": list(x.shape), "sparsity": job.plan.sparsity[x.name]} for x in layers}
        estimate = {**needed.to_json(), "plan_seconds": round(planning, 1)}
        emit({"layers": listed, "target": job.plan.target, "pattern": str(job.plan.pattern), "estimate": estimate})
        return
    rows = [[x.name, f"{x.shape[0]} x {x.shape[1]}", f"{job.plan.sparsity[x.name]:.4f}"] for x in layers]
    table("What would be pruned", ["layer", "out x in", "sparsity"], rows)
    say(
        f"{len(rows)} layers, {sum(x.shape[0] * x.shape[1] for x in layers):,} weights, sparsity {job.plan.target:g}, "
        f"pattern {job.plan.pattern}. The plan took {duration(planning)} to make. Nothing was written."
    )
