"""`billhook gradients`: gradients of the dense model, to be read by `billhook prune --criterion gblm`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from billhook.cli.common import emit, layers_per_block, progress, say
from billhook.cli.options import Json, Model, SpillGib, Text, Work, output_option

NAME = "gradients"
EXAMPLES = """\b
Examples:
  billhook gradients model --calibration text.txt -o gradients.safetensors
  billhook gradients model --norm l2 --calibration hub:c4 --dtype float32 -o gradients.safetensors
  billhook prune model --sparsity 0.5 --criterion gblm --gradients gradients.safetensors --calibration t.txt -o pruned
"""
NORM_HELP = "Norm over the windows; the same as the criterion's."


def command(
    model: Model,
    *,
    output: Annotated[Path, output_option("The gradients.safetensors to write.")],
    norm: Annotated[Literal["l1", "l2"], typer.Option(help=NORM_HELP)] = "l1",
    text: Text,
    work: Work,
    spill_gib: SpillGib = 8.0,
    as_json: Json = False,
) -> None:
    """Accumulate the gradients of a model's loss on calibration text, one block in memory at a time."""
    from billhook.methods.statistics import gradient_name
    from billhook.steps.gradients import gradient_bytes, make_gradients, open_for_gradients
    from billhook.steps.inputs import ModelRequest
    from billhook.store.files import check_new_file
    from billhook.store.output import check_room

    check_new_file(output)
    statistic = gradient_name(norm, "reference" if text.published else "paper")
    opened = open_for_gradients(ModelRequest(model=model, **vars(text), **work.fields(model), spill_gib=spill_gib))
    check_room(output.absolute(), gradient_bytes(opened.layers))
    with progress("gradients", len(opened.layers), unit=layers_per_block(opened.layers)) as advance:
        made = make_gradients(opened, statistic, output, advance)
    facts = {"statistic": made.statistic, "layers": len(made), "samples": made.about["samples"]}
    say(f"{output}: {made.statistic} of {len(made)} layers over {made.about['samples']} windows.")
    if as_json:
        emit({"output": str(output), **facts})
