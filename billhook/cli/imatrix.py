"""`billhook imatrix`: an importance matrix for llama.cpp's quantizer."""

from pathlib import Path
from typing import Annotated

from billhook.cli.common import emit, layers_per_block, progress, say
from billhook.cli.options import Json, Model, Text, Work, output_option

NAME = "imatrix"
EXAMPLES = """\b
Examples:
  billhook imatrix ./model --calibration text.txt -o model.imatrix.gguf
"""


def command(
    model: Model,
    *,
    output: Annotated[Path, output_option("The file to write.")],
    text: Text,
    work: Work,
    as_json: Json = False,
) -> None:
    """Measure the squared inputs of each weight, and write them for llama-quantize --imatrix."""
    from billhook.steps.export import gguf_files
    from billhook.steps.imatrix import make_imatrix, open_for_imatrix
    from billhook.steps.inputs import ModelRequest
    from billhook.store.files import check_new_file

    check_new_file(output, *gguf_files(model))
    opened = open_for_imatrix(ModelRequest(model=model, output=None, **vars(text), **work.fields(model)))
    layers = opened.layers
    with progress("measuring", len(layers), unit=layers_per_block(layers)) as advance:
        weights = make_imatrix(opened, output, advance)
    say(f"{output}: {weights} weights. Use it: llama-quantize --imatrix {output} MODEL.gguf OUT.gguf TYPE")
    if as_json:
        emit({"output": str(output), "weights": weights})
