"""`billhook measure`: fill the table that allocators read."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import (
    BatchSize,
    Calibration,
    Device,
    Dtype,
    Ignore,
    Json,
    Length,
    Samples,
    Sampling,
    Seed,
    Targets,
    TrustRemoteCode,
    emit,
    guarded,
    progress,
    say,
)

NAME = "measure"
EXAMPLES = """\b
Examples:
  billhook measure ./model -o table.json
  billhook measure ./model --metrics alpha_peak,alpha_mid,stable_rank -o table.json
  billhook measure ./model --metrics outlier_ratio:5 --calibration text.txt -o table.json
"""


@guarded
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table.json to write.")],
    metrics: Annotated[str, typer.Option(help="Comma-separated; see billhook ls metrics.")] = "alpha_peak",
    calibration: Calibration = None,
    samples: Samples = 128,
    length: Length = None,
    sampling: Sampling = "packed",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    targets: Targets = None,
    ignore: Ignore = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure every prunable layer and write table.json."""
    from billhook.files import check_writable
    from billhook.job import Request, measure_model
    from billhook.measuring import metric_names
    from billhook.ranks import joined
    from billhook.torchrun import rank

    names = metric_names(metrics)
    check_writable(output)
    request = Request(
        model=model, calibration=calibration, samples=samples, length=length, sampling=sampling, batch_size=batch_size, seed=seed,
        targets=targets or (), ignore=ignore or (), device=device, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with joined(device), progress("measuring") as advance:
        table = measure_model(request, names, advance)
        if not rank():
            table.save(output)
    say(f"{output}: {len(table.rows)} layers, columns {', '.join([*table.columns(), *table.rows[0].curves])}.")
    if as_json:
        emit({"output": str(output), "layers": len(table.rows), "columns": table.columns()})
