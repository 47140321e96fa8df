"""`billhook analyze`: how the error of each block's output grows with depth, for several plans."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import (
    Calibration,
    Json,
    Length,
    Settings,
    TrustRemoteCode,
    emit,
    handle_errors,
    parse_settings,
    say,
    table,
)
from billhook.cli.groups import Work, grouped

NAME = "analyze"
EXAMPLES = """\b
Examples:
  billhook analyze ./model --plan found/plan.json --plan uniform.json --calibration text.txt -o analysis.json
"""


@handle_errors
@grouped
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    *,
    plan: Annotated[list[Path] | None, typer.Option(help="A plan.json. Repeatable.", metavar="PLAN")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The analysis.json to write; a picture, .svg, goes beside it.")
    ] = None,
    criterion: Annotated[str, typer.Option(help="Which weights go: see billhook ls criteria.")] = "wanda",
    settings: Settings = None,
    calibration: Calibration = None,
    samples: Annotated[
        int, typer.Option(help="Windows to draw: one half calibrates, eight of the other are compared.", min=1)
    ] = 16,
    length: Length = None,
    work: Work,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show the relative error of each block's output after pruning by each plan."""
    from billhook.analysis import analyze, draw
    from billhook.store.files import check_writable, write_json

    if output is not None:
        check_writable(output)
    found = analyze(
        model, {str(path): path for path in plan or []}, progress=lambda name: say(f"{name}: pruned"),
        criterion=criterion, options=parse_settings(settings), calibration=calibration, samples=samples, length=length,
        **work.fields(), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if output is not None:
        write_json(output, found)
        picture = output.with_suffix(".svg")
        draw(found, picture)
        say(f"Written to {output} and {picture}.")
    if as_json:
        emit(found)
        return
    errors = [entry["relative_error"] for entry in found["plans"].values()]
    rows = [[str(block), *(f"{e[block]:.4f}" for e in errors)] for block in range(len(errors[0]))]
    table("Relative error of each block's output", ["block", *found["plans"]], rows)
