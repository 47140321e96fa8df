"""`billhook export`: write a model directory in the format of another program."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from billhook.cli.common import emit, progress, say
from billhook.cli.options import Json, Model, output_option

NAME = "export"
EXAMPLES = """\b
Examples:
  billhook export ./pruned --to gguf -o pruned.gguf
  billhook export ./pruned --to gguf --type q8_0 -o pruned-q8_0.gguf
  billhook export ./pruned --to gguf --template converted-f16.gguf -o pruned.gguf
"""
TYPE_HELP = "Type of the weights; auto is the checkpoint's, or f16 for float32. Norms and biases are always f32."
TEMPLATE_HELP = (
    "A file that llama.cpp's convert_hf_to_gguf.py made of this model: its metadata and tokenizer are taken, and the "
    "names of tensors of an unknown architecture."
)


def command(
    model: Model,
    *,
    output: Annotated[Path, output_option("The file to write.")],
    to: Annotated[Literal["gguf"], typer.Option(help="Format: gguf is that of llama.cpp.")] = "gguf",
    kind: Annotated[Literal["auto", "f16", "bf16", "f32", "q8_0"], typer.Option("--type", help=TYPE_HELP)] = "auto",
    template: Annotated[Path | None, typer.Option(help=TEMPLATE_HELP, metavar="FILE")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write one file that llama.cpp runs as it is, with the tokenizer and the chat template."""
    from billhook.steps.export import export_gguf

    with progress("writing tensors") as advance:
        written = export_gguf(model, output, kind=kind, template=template, overwrite=overwrite, progress=advance)
    for note in written.notes:
        say(f"note: {note}")
    types = ", ".join(f"{count} of {name}" for name, count in written.types.items())
    say(f"{written.path}: {written.bytes / 1e6:,.1f} MB; tensors: {types}.")
    if as_json:
        emit({"output": str(written.path), "bytes": written.bytes, "types": written.types, "notes": written.notes})
