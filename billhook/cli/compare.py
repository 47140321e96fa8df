"""`billhook compare`: allocators, criteria, plans and sparsities on one model, or finished runs side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from billhook.cli.common import emit, load_plans, numbers, parse_settings, say, split_list, table
from billhook.cli.options import Json, Limit, Settings, Text, Work, fraction, output_option

if TYPE_CHECKING:
    from billhook.comparison.record import Comparison

NAME = "compare"
EXAMPLES = """\b
Examples:
  billhook compare model --sparsities 0.6 --recipes fast,good,owl --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --sparsities 0.5,0.6 --allocators uniform,owl,atp --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --patterns 2:4,4:8 --criteria wanda,sparsegpt --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --sparsities 0.6 --criteria wanda,admm --seeds 3 --calibration c4.txt --data wiki.txt -o grid
  billhook compare model --plans a.json,b.json --errors --calibration c4.txt --data wiki.txt -o grid
  billhook compare --runs grid other-grid
"""
MODELS_HELP = "Model directory, GGUF file, or a name on the hub; with --runs, finished runs."
OUTPUT_HELP = "Directory for compare.json, tables and pictures; an unfinished comparison is continued."


def _list(meaning: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=f"{meaning}, separated by commas.", metavar="LIST")
    return option


def command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL|DIR...", help=MODELS_HELP)],
    *,
    sparsities: Annotated[str, _list("Fractions to remove")] = "",
    recipes: Annotated[str, _list("Recipes (billhook ls recipes), fast and good if no method is given")] = "",
    allocators: Annotated[str, _list("Allocators (billhook ls allocators), uniform if only criteria are given")] = "",
    criteria: Annotated[str, _list("Criteria (billhook ls criteria), admm if only allocators are given")] = "",
    patterns: Annotated[str, _list("unstructured and N:M")] = "unstructured",
    plans: Annotated[str, _list("Files plan.json, compared with the allocators")] = "",
    seeds: Annotated[
        int,
        typer.Option(help="Repeat with this many draws of calibration windows: mean and standard deviation.", min=1),
    ] = 1,
    data: Annotated[
        str | None, typer.Option(help="Text to score, in the forms of billhook eval.", metavar="SOURCE")
    ] = None,
    limit: Limit = None,
    output: Annotated[Path | None, output_option(OUTPUT_HELP)] = None,
    errors: Annotated[bool, typer.Option("--errors", help="Show the error of each block's output, by depth.")] = False,
    runs: Annotated[bool, typer.Option("--runs", help="Compare two or more directories of finished runs.")] = False,
    settings: Settings = None,
    text: Text,
    work: Work,
    overwrite: Annotated[bool, typer.Option(help="Start again if the output holds another comparison.")] = False,
    as_json: Json = False,
) -> None:
    """Compare allocators, criteria, plans, patterns and sparsities on one model; or finished runs."""
    from billhook.errors import BillhookError, JobError

    if runs:
        layers = (work.targets, work.ignore, work.stacks)
        if any((sparsities, plans, data, output, errors, text.calibration, settings, *layers)):
            raise BillhookError("--runs compares finished runs: leave out the options of a new comparison.")
        return _show_runs([Path(folder) for folder in models], as_json)
    if len(models) != 1 or data is None or output is None:
        raise BillhookError(
            "A comparison needs one MODEL, --data SOURCE to score, and --output DIR; or --runs DIR1 DIR2."
        )
    if sparsities and "unstructured" not in split_list(patterns):
        raise BillhookError(
            "An N:M pattern has its own sparsity: leave out --sparsities, or add unstructured to --patterns."
        )
    from billhook.comparison.grid import Grid, compare
    from billhook.plan.recipes import DEFAULT, RECIPES

    pairs, named = (split_list(allocators), split_list(criteria)), split_list(recipes)
    if any(pairs) or plans:  # what is left out is as in billhook prune
        pairs = (pairs[0] or ([] if plans and not pairs[1] else ["uniform"]), pairs[1] or [RECIPES[DEFAULT].criterion])
    elif not named:
        named = ["fast", DEFAULT]
    fractions = numbers(sparsities, fraction, "--sparsities", "0.5,0.6,0.7")
    given = {f"plan {name}": plan for name, plan in load_plans([Path(path) for path in split_list(plans)]).items()}
    grid = Grid(
        sparsities=fractions, allocators=pairs[0], criteria=pairs[1], patterns=split_list(patterns), seeds=seeds,
        options=parse_settings(settings), plans=given, recipes=named,
    )  # fmt: skip
    fields = {**vars(text), **work.fields(models[0], streams=False)}
    try:
        found = compare(models[0], grid, data, limit=limit, output=output, overwrite=overwrite, progress=say, **fields)
    except KeyboardInterrupt:
        raise JobError(f"Stopped. Finished cells are in {output}: the same command continues from there.") from None
    _show(found, errors, as_json)


def _show(found: "Comparison", errors: bool, as_json: bool) -> None:
    """Write tables and pictures next to compare.json, and print the tables or the JSON object."""
    from billhook.comparison.views import caption, error_tables, score_table, write_views

    files = write_views(found)
    if as_json:
        emit(found.to_json())
    else:
        table("", *score_table(found))
        print(caption(found))
        for title, (header, rows) in error_tables(found).items() if errors else ():
            print(f"\n{title}")
            table("", header, rows)
    say(f"{found.folder}: compare.json, {', '.join(files)}.")


def _show_runs(folders: list[Path], as_json: bool) -> None:
    from billhook.comparison.record import TITLES, measure_of, shown
    from billhook.comparison.runs import compare_runs
    from billhook.errors import BillhookError

    if len(folders) < 2:
        raise BillhookError("--runs compares finished runs: give two or more directories.")
    found = compare_runs(folders)
    if as_json:
        return emit(found)
    rows, measure = [], measure_of(found["runs"][0])
    text = measure == "token_ppl"
    for row in found["runs"]:
        scores = ["-" if row[key] is None else f"{row[key]:.4f}" for key in ("token_ppl", "dense_token_ppl")]
        scores = scores if text else [shown(measure, row[measure]), f"{row['nll']:.4f}"]
        rows.append([row["run"], row["method"], row["pattern"], f"{100 * row['sparsity']:.2f} %", *scores])
    names = [TITLES[measure], "dense" if text else "loss"]
    table("", ["run", "method", "pattern", "sparsity", *names], rows, 3)
    data = found["data"]
    size = f"{data['windows']} windows of {data['length']} tokens" if text else f"{data['windows']} inputs"
    print(f"{found['protocol']}, {size} of {data['source']}")
