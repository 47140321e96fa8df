"""`billhook export`: write a model directory in the format of another program, or decode a quantized one."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from billhook.cli.common import emit, progress, say, say_notes
from billhook.cli.options import SPLIT_HELP, TEMPLATE_HELP, Json, Model, output_option

NAME = "export"
EXAMPLES = """\b
Examples:
  billhook export ./pruned --to gguf -o pruned.gguf
  billhook export ./pruned --to gguf --type q8_0 -o pruned-q8_0.gguf
  billhook export ./pruned --to gguf --template converted-f16.gguf -o pruned.gguf
  billhook export ./quantized --to dense -o decoded
  billhook export ./int4 --to vllm -o for-vllm
  billhook export ./q4 --to tensor-types -o types.txt
"""
TO_HELP = (
    "gguf: a file for llama.cpp. dense: a directory of 16-bit weights, decoded. vllm: a directory for vLLM. "
    "tensor-types: the types of a GGUF file's tensors, for llama-quantize --tensor-type-file."
)
TYPE_HELP = (
    "Type of the weights; auto is the checkpoint's, or f16 for float32. Norms and biases in gguf are always f32; "
    "q8_0 is for gguf."
)


def command(
    model: Model,
    *,
    output: Annotated[Path, output_option("The file, or for dense and vllm the directory, to write.")],
    to: Annotated[Literal["gguf", "dense", "vllm", "tensor-types"], typer.Option(help=TO_HELP)] = "gguf",
    kind: Annotated[Literal["auto", "f16", "bf16", "f32", "q8_0"], typer.Option("--type", help=TYPE_HELP)] = "auto",
    template: Annotated[Path | None, typer.Option(help=TEMPLATE_HELP, metavar="FILE")] = None,
    split_size: Annotated[str | None, typer.Option(help=SPLIT_HELP, metavar="SIZE")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an output that exists.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model, quantized or not, for llama.cpp, for vLLM, or as ordinary 16-bit weights."""
    from billhook.errors import BillhookError
    from billhook.steps.export import export_dense, export_gguf, export_tensor_types, export_vllm

    if (template, split_size) != (None, None) and to != "gguf":
        raise BillhookError("--template and --split-size are for --to gguf.")
    if to in ("vllm", "tensor-types") and kind != "auto":
        raise BillhookError(f"--type is not for --to {to}, which keeps the types: billhook quantize makes others.")
    with progress("writing tensors") as advance:
        if to == "gguf":
            written = export_gguf(
                model, output, kind=kind, template=template, split_size=split_size, overwrite=overwrite,
                progress=advance,
            )  # fmt: skip
        elif to == "dense":
            written = export_dense(model, output, kind=kind, overwrite=overwrite, progress=advance)
        elif to == "vllm":
            written = export_vllm(model, output, overwrite=overwrite, progress=advance)
        else:
            written = export_tensor_types(model, output, overwrite=overwrite)
    say_notes(written.notes)
    types = ", ".join(f"{count} of {name}" for name, count in written.types.items())
    more = f" and {len(written.parts) - 1} more" if len(written.parts) > 1 else ""
    size = "" if to == "tensor-types" else f"{written.bytes / 1e6:,.1f} MB; "
    say(f"{written.path}{more}: {size}tensors: {types}.")
    if to == "tensor-types":
        say(f"Use it: llama-quantize --tensor-type-file {written.path} MODEL-f16.gguf OUT.gguf Q4_K_M")
    if as_json:
        emit({"output": str(written.path), "bytes": written.bytes, "types": written.types, "notes": written.notes})
