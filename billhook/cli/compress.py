"""`billhook compress`: a model directory in, a file of a given size with the least loss out."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

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
    split_list,
)
from billhook.plan.allocators import AUTO
from billhook.plan.level_allocators import LEVEL_ALLOCATORS
from billhook.racing.allocators import MODEL_ALLOCATORS

if TYPE_CHECKING:
    from billhook.steps.compress import CompressReport, CompressRequest

NAME = "compress"
EXAMPLES = """\b
Examples:
  billhook compress model --size 2.5GB --calibration text.txt -o small
  billhook compress model --fit 16GB --context 8192 --calibration text.txt -o small
  billhook compress model --size 2.0GB --levels small --calibration text.txt -o smaller
  billhook compress model --bits 3.5 --types q2_k,q3_k,q4_k,q6_k --calibration hub:c4 -o small
  billhook compress model --ratio 0.25 --for vllm --calibration text.txt -o small
  billhook compress model --bits 3.5 --allocator alphaq --set gamma=0.5 --calibration text.txt -o small
  billhook compress model --allocator like:other.gguf --calibration text.txt -o small
  billhook compress model --bits 2.5 --units experts,channels --calibration text.txt -o small
"""
FIT_HELP = "Memory in which the file must fit in llama.cpp together with a context, such as 16GB."
CONTEXT_HELP = "Tokens of context for --fit.  [default: 8192, or the model's]"
LEVELS_HELP = "Output of an earlier compress of this model: its measured errors are used, and only the size is new."
UNITS_HELP = "Kinds of units that may go too, such as experts,channels, where that is measured to lose less than bits."
FOR_HELP = "gguf: a file for llama.cpp. transformers, vllm: a compressed-tensors directory."


def level_allocators() -> list[str]:
    """The names of the allocators of storage types."""
    return [*LEVEL_ALLOCATORS.names(), *MODEL_ALLOCATORS.names(), AUTO, "like:"]


@dataclass(frozen=True)
class Size:
    """How large the result may be, and what may be in it."""

    size: Annotated[str | None, typer.Option(help="Size of the file, such as 2.5GB (10^9 bytes) or 2GiB.")] = None
    bits: Annotated[float | None, typer.Option(help="Bits per parameter of the model, everything counted.")] = None
    ratio: Annotated[float | None, typer.Option(help="Fraction of the size in 16 bits.")] = None
    fit: Annotated[str | None, typer.Option(help=FIT_HELP)] = None
    context: Annotated[int | None, typer.Option(help=CONTEXT_HELP, min=1)] = None
    target: Annotated[Literal["gguf", "transformers", "vllm"], typer.Option("--for", help=FOR_HELP)] = "gguf"
    types: Annotated[
        str | None,
        typer.Option(help="Choose only from these types, separated by commas.", metavar="TYPES"),
    ] = None
    allocator: Annotated[
        str,
        typer.Option(
            help="How types are chosen: see billhook ls level-allocators; auto tries several on held-out text, "
            "like:FILE.gguf takes the types of that file.",
            metavar="NAME",
            autocompletion=lambda incomplete: [name for name in level_allocators() if name.startswith(incomplete)],
        ),
    ] = "curves"
    levels: Annotated[Path | None, typer.Option(help=LEVELS_HELP, metavar="DIR")] = None
    recipe: shared.BitsRecipe = "good"
    units: Annotated[str | None, typer.Option(help=UNITS_HELP, metavar="KINDS")] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of GPTQ or of the allocator. Repeatable.", metavar="KEY=VALUE"),
    ] = None


def command(
    model: shared.Model,
    *,
    output: Annotated[Path, shared.output_option("Directory of the result; must be new or empty.")],
    size: Size,
    text: shared.Text,
    work: shared.Work,
    writing: shared.GgufWriting,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=shared.DRY_RUN_HELP)] = False,
    as_json: shared.Json = False,
) -> None:
    """Meet a size with the least loss: a storage type for every tensor, by what each is measured to lose."""
    from billhook.cli.dry_run import show_job
    from billhook.steps.compress import CompressRequest, check, decide, run_compress
    from billhook.steps.sample_quantize import estimate_quantize
    from billhook.steps.state import finished_items

    lists = {"types": split_list(size.types), "units": split_list(size.units)}
    chosen = {**vars(size), **lists, "options": parse_settings(size.settings)}
    chosen.pop("settings")
    groups: dict[str, Any] = {**chosen, **vars(text), **work.fields(model), **vars(writing)}
    request = CompressRequest(model, output, **groups)
    if request.units:
        return _with_units(request, dry_run, as_json)
    with progress("reading") as advance:
        checked = check(request, advance)
    unit = layers_per_block(checked.opened.layers)
    with progress("choosing types", checked.steps, unit=unit) as advance:
        job = decide(checked, advance)
    if job.memory is not None:
        say(f"In memory {job.memory}: {job.budget:,} bytes are left for the file.")
    if dry_run:
        return show_job(job.quantizing, as_json)
    say_notes(job.quantizing.notes)
    announce(estimate_quantize(job.quantizing), work.device)
    layers = job.quantizing.opened.layers
    done = finished_items(output, writing.resume)
    bar = progress("quantizing", len(layers), unit=layers_per_block(layers), skipped=done)
    with bar as advance, graceful_interrupt() as stopping:
        report = run_compress(job, advance, stopping)
    say_notes(report.quantized.warnings[len(job.quantizing.notes) :])
    _say_result(report)
    if as_json:
        emit(report.to_json())


def _with_units(request: "CompressRequest", dry_run: bool, as_json: bool) -> None:
    """The same where units may go, too."""
    from billhook.cli.dry_run import show_job
    from billhook.errors import BillhookError
    from billhook.steps.compress_units import discard, prepare_units, run_units

    with progress("removing units and choosing types") as advance:
        job = prepare_units(request, advance)
    say_notes(job.notes)
    for c in job.candidates:
        say(f"{c.share:.1%} of the parameters in blocks removed: predicted divergence {c.predicted:.4f}.")
    if dry_run:
        try:
            if job.best.job is None:
                raise BillhookError("This run has quantized its best candidate: leave out --dry-run.")
            return show_job(job.best.job.quantizing, as_json, keeps=False)
        finally:
            if not request.resume:  # which would delete what the stopped run has made
                discard(job)
    with progress("quantizing") as advance, graceful_interrupt() as stopping:
        report = run_units(job, advance, stopping)
    found = report.quantized
    say_notes(found.warnings)
    for share, kl in report.measured.items():
        say(f"{share:.1%} removed: measured divergence {kl:.4f}{', which is kept' * (share == report.share)}.")
    gone = f"{report.share:.1%} of the parameters in blocks removed"
    say(f"{found.output}: {found.size:,} bytes of at most {report.budget:,}, {gone}.")
    if found.loss is not None:
        say(f"{found.loss}.")
    say_next(found.output)
    if as_json:
        emit(report.to_json())


def _say_result(report: "CompressReport") -> None:
    """Print what a run did, and what other sizes would lose."""
    found = report.quantized
    kinds = ", ".join(f"{count} {type}" for type, count in report.counts.items())
    took = duration(found.seconds)
    say(f"{found.output}: {found.size:,} bytes of at most {report.budget:,}. Layers: {kinds}. {took}.")
    if found.loss is not None:
        say(f"{found.loss}.")
    for factor, ratio in report.loss_by_size.items():
        kl = None if found.loss is None or found.loss.divergence is None else found.loss.divergence * ratio
        about = f"about {ratio:.2f} times this one" + ("" if kl is None else f" ({kl:.3g})")
        say(f"With {factor:.0%} of this size ({int(report.budget * factor):,} bytes) the divergence would be {about}.")
    say_next(found.output)
