"""`billhook compress`: a model directory in, a file of a given size with the least loss out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from billhook.cli import options as shared
from billhook.cli.common import emit, parse_settings, progress, say, split_list
from billhook.plan.allocators import AUTO
from billhook.plan.level_allocators import LEVEL_ALLOCATORS
from billhook.racing.allocators import MODEL_ALLOCATORS

NAME = "compress"
EXAMPLES = """\b
Examples:
  billhook compress model --size 2.5GB --calibration text.txt -o small
  billhook compress model --bits 3.5 --types q2_k,q3_k,q4_k,q6_k --calibration hub:c4 -o small
  billhook compress model --ratio 0.25 --for vllm --calibration text.txt -o small
  billhook compress model --bits 3.5 --allocator alphaq --set gamma=0.5 --calibration text.txt -o small
  billhook compress model --allocator like:other.gguf --calibration text.txt -o small
"""
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
    target: Annotated[Literal["gguf", "transformers", "vllm"], typer.Option("--for", help=FOR_HELP)] = "gguf"
    types: Annotated[
        str | None,
        typer.Option(help="Only these types for the layers, separated by commas.", metavar="TYPES"),
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
    writing: shared.Writing,
    as_json: shared.Json = False,
) -> None:
    """Meet a size with the least loss: a storage type for every tensor, by what each is measured to lose."""
    from billhook.steps.compress import CompressRequest, run_compress

    sizes = {"size": size.size, "bits": size.bits, "ratio": size.ratio, "target": size.target}
    chosen = {
        **sizes,
        "types": split_list(size.types),
        "allocator": size.allocator,
        "options": parse_settings(size.settings),
    }
    groups: dict[str, Any] = {**chosen, **vars(text), **work.fields(model, streams=False), **vars(writing)}
    with progress("compressing") as advance:
        report = run_compress(CompressRequest(model, output, **groups), advance)
    found = report.quantized
    for warning in found.warnings:
        say(f"note: {warning}")
    kinds = ", ".join(f"{count} {type}" for type, count in report.counts.items())
    say(f"{found.output}: {found.size:,} bytes of at most {report.budget:,}. Layers: {kinds}. {found.seconds:.1f} s.")
    if found.loss is not None:
        say(f"{found.loss}.")
    for factor, loss in report.outlook.items():
        say(f"With {factor:.0%} of this budget the divergence would be about {loss:.2f} times this one.")
    say(f"Check it: billhook verify {found.output}")
    if as_json:
        emit(report.to_json())
