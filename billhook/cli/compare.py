"""`billhook compare`: allocators, criteria, plans and sparsities on one model, or finished runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from billhook.cli.common import (
    Json,
    Settings,
    TrustRemoteCode,
    emit,
    handle_errors,
    parse_settings,
    say,
    table,
)
from billhook.cli.groups import Text, Work, grouped

if TYPE_CHECKING:
    from billhook.comparison.record import Comparison
    from billhook.plan.plan import Plan

NAME = "compare"
EXAMPLES = """\b
Examples:
  billhook compare model --sparsities 0.5,0.6 --allocators uniform,owl,atp --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --patterns 2:4,4:8 --criteria wanda,sparsegpt --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --sparsities 0.6 --criteria wanda,admm --seeds 3 --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --plans a.json,b.json --errors --calibration c4.txt --data wiki.txt -o grid
  billhook compare --runs grid other-grid
"""


@handle_errors
@grouped
def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL|DIR...", help="Model directory, or a name on the hub; with --runs, finished runs."
        ),
    ],
    *,
    sparsities: Annotated[str, typer.Option(help="Fractions to remove, with commas.", metavar="LIST")] = "",
    allocators: Annotated[
        str, typer.Option(help="Allocators, with commas: see billhook ls allocators.", metavar="LIST")
    ] = "uniform",
    criteria: Annotated[
        str, typer.Option(help="Criteria, with commas: see billhook ls criteria.", metavar="LIST")
    ] = "wanda",
    patterns: Annotated[str, typer.Option(help="unstructured and N:M, with commas.", metavar="LIST")] = "unstructured",
    plans: Annotated[
        str, typer.Option(help="Files plan.json, with commas: compared beside the allocators.", metavar="LIST")
    ] = "",
    seeds: Annotated[
        int, typer.Option(help="Repeat with this many draws of calibration windows: mean and spread.", min=1)
    ] = 1,
    data: Annotated[
        str | None, typer.Option(help="Text to score, in the forms of billhook eval.", metavar="SOURCE")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Score at most this many windows.", min=1)] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Directory for compare.json, tables and pictures; an unfinished one is continued."
        ),
    ] = None,
    errors: Annotated[
        bool, typer.Option("--errors", help="Also show the error of each block's output, by depth.")
    ] = False,
    runs: Annotated[
        bool, typer.Option("--runs", help="Compare finished runs, given as two or more directories.")
    ] = False,
    settings: Settings = None,
    text: Text,
    work: Work,
    overwrite: Annotated[bool, typer.Option(help="Start again if the output holds another comparison.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Compare allocators, criteria, plans, patterns and sparsities on one model; or finished runs."""
    from billhook.errors import BillhookError, JobError

    if runs:
        new = (sparsities, plans, data, output, errors, text.calibration, settings, work.targets, work.ignore)
        if any(new):
            raise BillhookError("--runs compares finished runs: leave out the options of a new comparison.")
        _show_runs([Path(folder) for folder in models], as_json)
        return
    if len(models) != 1 or data is None or output is None:
        raise BillhookError(
            "A comparison needs one MODEL, --data SOURCE to score, and --output DIR; or --runs DIR1 DIR2."
        )
    if sparsities and "unstructured" not in _names(patterns):
        raise BillhookError(
            "An N:M pattern has its own sparsity: leave out --sparsities, or add unstructured to --patterns."
        )
    from billhook.comparison.grid import Grid, compare

    axes = (_numbers(sparsities), _names(allocators), _names(criteria), _names(patterns))
    grid = Grid(*axes, seeds, parse_settings(settings), _plans(plans))
    try:
        found = compare(
            models[0], grid, data, limit=limit, output=output, overwrite=overwrite, progress=say, **vars(text),
            **work.fields(), trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise JobError(f"Stopped. Finished cells are in {output}: the same command continues from there.") from None
    _show(found, errors, as_json)


def _show(found: "Comparison", errors: bool, as_json: bool) -> None:
    """Write tables and pictures beside compare.json, and print the tables or the JSON object."""
    from billhook.comparison.views import caption, error_tables, perplexity_table, write_views

    files = write_views(found)
    if as_json:
        emit(found.to_json())
    else:
        table("", *perplexity_table(found))
        print(caption(found))
        for title, (header, rows) in error_tables(found).items() if errors else ():
            print(f"\n{title}")
            table("", header, rows)
    say(f"{found.folder}: compare.json, {', '.join(files)}.")


def _show_runs(folders: list[Path], as_json: bool) -> None:
    from billhook.comparison.runs import compare_runs
    from billhook.errors import BillhookError

    if len(folders) < 2:
        raise BillhookError("--runs compares finished runs: give two or more directories.")
    found = compare_runs(folders)
    if as_json:
        emit(found)
        return
    rows = []
    for row in found["runs"]:
        scores = [_ppl(row["token_ppl"]), _ppl(row["dense_token_ppl"])]
        rows.append([row["run"], row["method"], row["pattern"], f"{100 * row['sparsity']:.2f} %", *scores])
    table("", ["run", "method", "pattern", "sparsity", "token perplexity", "dense"], rows, 3)
    data = found["data"]
    print(f"{found['protocol']}, {data['windows']} windows of {data['length']} tokens of {data['source']}")


def _ppl(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _plans(text: str) -> dict[str, "Plan"]:
    from billhook.errors import BillhookError
    from billhook.plan.plan import load_plan

    paths = [Path(name) for name in _names(text)]
    found = {f"plan {path.stem}": load_plan(path) for path in paths}
    if len(found) < len(paths):
        raise BillhookError("Two plans have the same file name, which names the plan in the tables: rename one.")
    return found


def _numbers(text: str) -> list[float]:
    from billhook.errors import BillhookError

    try:
        return [float(part) for part in _names(text)]
    except ValueError:
        raise BillhookError(f"--sparsities {text}: write fractions with commas, such as 0.5,0.6,0.7.") from None
