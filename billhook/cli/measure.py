"""`billhook measure`: fill the table that allocators read."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import (
    Json,
    TrustRemoteCode,
    emit,
    handle_errors,
    layers_a_block,
    progress,
    say,
)
from billhook.cli.groups import Text, Work, grouped

NAME = "measure"
EXAMPLES = """\b
Examples:
  billhook measure ./model -o table.json
  billhook measure ./model --metrics alpha_peak,alpha_mid,stable_rank -o table.json
  billhook measure ./model --metrics outlier_ratio:5 --calibration text.txt -o table.json
"""


@handle_errors
@grouped
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The table.json to write.")],
    metrics: Annotated[str, typer.Option(help="Comma-separated; see billhook ls metrics.")] = "alpha_peak",
    text: Text,
    work: Work,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure every prunable layer and write table.json."""
    from billhook.distributed.collectives import distributed
    from billhook.distributed.torchrun import rank
    from billhook.measurement.measure import metric_names, steps
    from billhook.steps.measure import measure_opened, open_to_measure
    from billhook.steps.request import Request
    from billhook.store.files import check_writable

    names = metric_names(metrics)
    check_writable(output)
    request = Request(model=model, **vars(text), **work.fields(), trust_remote_code=trust_remote_code)
    with distributed(work.device):
        opened = open_to_measure(request, names)
        total, unit = steps(names, len(opened.layers)), layers_a_block(opened.layers)
        with progress("measuring", total, unit=unit) as advance:
            table = measure_opened(opened, names, advance)
        if not rank():
            table.save(output)
    say(f"{output}: {len(table.rows)} layers, columns {', '.join([*table.columns(), *table.rows[0].curves])}.")
    if as_json:
        emit({"output": str(output), "layers": len(table.rows), "columns": table.columns()})
