"""`billhook measure`: fill the table that allocators read."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import emit, layers_per_block, progress, say
from billhook.cli.options import Json, Model, Text, Work, output_option

NAME = "measure"
EXAMPLES = """\b
Examples:
  billhook measure ./model -o table.json
  billhook measure ./model --metrics alpha_peak,alpha_mid,stable_rank -o table.json
  billhook measure ./model --metrics outlier_ratio:5 --calibration text.txt -o table.json
"""


def command(
    model: Model,
    *,
    output: Annotated[Path, output_option("The table.json to write.")],
    metrics: Annotated[str, typer.Option(help="Separated by commas; see billhook ls metrics.")] = "alpha_peak",
    text: Text,
    work: Work,
    as_json: Json = False,
) -> None:
    """Measure every prunable layer and write table.json."""
    from billhook.distributed.collectives import distributed
    from billhook.distributed.torchrun import rank
    from billhook.measurement.measure import metric_names, progress_calls
    from billhook.steps.inputs import ModelRequest
    from billhook.steps.measure import measure_opened, open_to_measure
    from billhook.store.files import check_new_file

    names = metric_names(metrics)
    check_new_file(output)
    request = ModelRequest(model=model, **vars(text), **work.fields(model))
    with distributed(request.device):
        opened = open_to_measure(request, names)
        total, unit = progress_calls(names, len(opened.layers)), layers_per_block(opened.layers)
        with progress("measuring", total, unit=unit) as advance:
            table = measure_opened(opened, names, advance)
        if not rank():
            table.save(output)
    say(f"{output}: {len(table.rows)} layers, columns {', '.join([*table.columns(), *table.rows[0].curves])}.")
    if as_json:
        emit({"output": str(output), "layers": len(table.rows), "columns": table.columns()})
