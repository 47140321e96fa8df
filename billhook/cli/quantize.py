"""`billhook quantize`: a model directory in, a directory with fewer bits per weight out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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
)

NAME = "quantize"
EXAMPLES = """\b
Examples:
  billhook quantize model --type int4 --calibration text.txt -o small
  billhook quantize model --type int3/32 --calibration hub:c4 --set sweeps=8 -o smaller
  billhook quantize model --type q4_k --calibration text.txt -o for-llama.cpp
  billhook quantize model --type q4_k --quantizer round --imatrix imatrix.gguf -o weighted
  billhook quantize model --type int2/32 --recipe best --calibration text.txt -o smallest
  billhook quantize model --type int8 --quantizer round -o fast
  billhook quantize model --type q4_k --calibration text.txt -o small --dry-run
"""
TYPE_HELP = (
    "Storage type. GGUF types (q4_k, iq3_s, ...) make a .gguf file for llama.cpp; int2 to int8, with /GROUP columns a "
    "scale (int4/64), a directory for transformers and vLLM. See billhook ls types."
)

IMATRIX_HELP = "An importance matrix of llama.cpp (GGUF or .dat) instead of text, for --quantizer round."


@dataclass(frozen=True)
class Method:
    """What weights are rounded to, and how."""

    type: Annotated[str, typer.Option(help=TYPE_HELP)] = ""
    plan: Annotated[Path | None, typer.Option(help="A plan.json of storage types instead of one type.")] = None
    embeddings: Annotated[str, typer.Option(help="Type of embeddings and head of a .gguf file.")] = ""
    quantizer: Annotated[str, typer.Option(help="How codes are chosen: see billhook ls quantizers.")] = "gptq"
    imatrix: Annotated[Path | None, typer.Option(help=IMATRIX_HELP, metavar="FILE")] = None
    recipe: shared.BitsRecipe = "good"
    settings: shared.Settings = None


def command(
    model: shared.Model,
    *,
    output: Annotated[Path, shared.output_option("Directory of the quantized model; must be new or empty.")],
    method: Method,
    text: shared.Text,
    work: shared.Work,
    writing: shared.GgufWriting,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=shared.DRY_RUN_HELP)] = False,
    as_json: shared.Json = False,
) -> None:
    """Quantize a model: store its weights in fewer bits, as other programs read them."""
    from billhook.cli.dry_run import show_job
    from billhook.steps.quantize import QuantizeRequest, prepare, run
    from billhook.steps.sample_quantize import estimate_quantize
    from billhook.steps.state import finished_items

    chosen = {**vars(method), "options": parse_settings(method.settings)}
    chosen.pop("settings")
    groups: dict[str, Any] = {**chosen, **vars(text), **work.fields(model), **vars(writing)}
    request = QuantizeRequest(model, output=output, **groups)
    with progress("reading") as advance:
        job = prepare(request, advance)
    if dry_run:
        return show_job(job, as_json)
    say_notes(job.notes)
    announce(estimate_quantize(job), request.device)
    layers = job.opened.layers
    done = finished_items(output, writing.resume)
    bar = progress("quantizing", len(layers), unit=layers_per_block(layers), skipped=done)
    with bar as advance, graceful_interrupt() as stopping:
        report = run(job, advance, stopping)
    say_notes(report.warnings[len(job.notes) :])
    sizes = f"{report.size / 1e6:.1f} MB of weights, {report.source_size / 1e6:.1f} MB before"
    took = duration(report.seconds)
    say(f"{report.output}: {len(layers)} layers at {report.bits:.2f} bits a weight; {sizes}. {took}.")
    if report.loss is not None:
        say(f"{report.loss}.")
    say_next(report.output)
    if as_json:
        emit(report.to_json())
