"""`billhook gradients`: gradients of the dense model, to be read by `billhook prune --criterion gblm`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from billhook.cli.common import (
    Device,
    Dtype,
    Ignore,
    Json,
    Seed,
    Targets,
    TrustRemoteCode,
    emit,
    handle_errors,
    layers_a_block,
    progress,
    say,
)
from billhook.cli.groups import Text, grouped

NAME = "gradients"
EXAMPLES = """\b
Examples:
  billhook gradients model --calibration text.txt -o gradients.safetensors
  billhook gradients model --norm l2 --calibration hub:c4 --dtype float32 -o gradients.safetensors
  billhook prune model --sparsity 0.5 --criterion gblm --gradients gradients.safetensors --calibration t.txt -o pruned
"""


@handle_errors
@grouped
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The gradients.safetensors to write.")],
    norm: Annotated[
        Literal["l1", "l2"], typer.Option(help="Norm over the windows; the same as the criterion's.")
    ] = "l1",
    text: Text,
    seed: Seed = 0,
    targets: Targets = None,
    ignore: Ignore = None,
    spill_gib: Annotated[
        float,
        typer.Option(help="Stored activations beyond this many GiB go to temporary files beside the output.", min=0),
    ] = 8.0,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Accumulate the gradients of a model's loss on calibration text, one block in memory at a time."""
    from billhook.methods.statistics import gradient_name
    from billhook.steps.gradients import make_gradients, open_for_gradients
    from billhook.steps.request import Request
    from billhook.store.files import check_writable

    check_writable(output)
    request = Request(
        model=model, **vars(text), seed=seed, targets=targets or (), ignore=ignore or (), device=device, dtype=dtype,
        spill_gib=spill_gib, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    statistic = gradient_name(norm, "reference" if text.published else "paper")
    opened = open_for_gradients(request)
    total, unit = len(opened.layers), layers_a_block(opened.layers)
    with progress("gradients", total, unit=unit) as advance:
        made = make_gradients(opened, statistic, output, advance)
    say(f"{output}: {made.statistic} of {len(made)} layers over {made.about['samples']} windows.")
    if as_json:
        emit(
            {"output": str(output), "statistic": made.statistic, "layers": len(made), "samples": made.about["samples"]}
        )
