"""`billhook search`: choose allocator and hyperparameter on held-out windows of the calibration text."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from billhook.cli import options as shared
from billhook.cli.common import emit, parse_settings, say, say_next

NAME = "search"
EXAMPLES = """\b
Examples:
  billhook search model --sparsity 0.6 --calibration text.txt -o found
  billhook search model --sparsity 0.7 --allocator atp --grid --calibration hub:c4 -o found
  billhook search model --sparsity 0.5 --allocator atp,owl --criterion admm --budget 12 --calibration t.jsonl -o found
  billhook search model --sparsity 0.6 --budget 5m --no-model --calibration text.txt -o found
  billhook prune model --plan found/plan.json --calibration text.txt -o pruned
"""
OUTPUT_HELP = (
    "Directory for search.json, plan.json, search.svg and the pruned model/; an unfinished search is continued."
)
ALLOCATOR_HELP = "Names separated by commas, or all; uniform always takes part."
BUDGET_HELP = (
    "Number of trials in addition to uniform (9), or minutes for them (5m); by default at most eight per allocator."
)
SAMPLES_HELP = "Windows to draw: trials are pruned on one half and scored on the other."


def command(
    model: shared.Model,
    *,
    output: Annotated[Path, shared.output_option(OUTPUT_HELP)],
    sparsity: shared.Sparsity = None,
    pattern: shared.Pattern = "unstructured",
    recipe: shared.Recipe = None,
    criterion: shared.Criterion = None,
    allocator: Annotated[str, typer.Option(help=ALLOCATOR_HELP)] = "auto,alphapruning,atp,owl,dlp",
    settings: shared.Settings = None,
    budget: Annotated[str | None, typer.Option(metavar="TRIALS|MINUTES", help=BUDGET_HELP)] = None,
    objective: Annotated[
        Literal["kl", "ppl"], typer.Option(help="Loss: KL divergence from the dense model, or perplexity.")
    ] = "kl",
    grid: Annotated[
        bool, typer.Option("--grid", help="Try the published values (ATP: beta in steps of 0.002) instead.")
    ] = False,
    calibration: shared.Calibration = None,
    samples: Annotated[int, typer.Option(help=SAMPLES_HELP, min=1)] = 64,
    length: shared.Length = None,
    bos: shared.Bos = "auto",
    skip_unreadable: shared.SkipUnreadable = False,
    work: shared.Work,
    no_model: Annotated[bool, typer.Option("--no-model", help="Write no pruned model.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start again where the output holds another search.")] = False,
    as_json: shared.Json = False,
) -> None:
    """Find the allocator and hyperparameter that lose least, and prune with them."""
    from billhook.errors import JobError
    from billhook.steps.search import search

    options = parse_settings(settings)
    try:
        found = search(
            model, sparsity, allocator=allocator, budget=budget, objective=objective, grid=grid, output=output,
            save_model=not no_model, overwrite=overwrite, progress=say, pattern=pattern, options=options,
            recipe=recipe or "", criterion=criterion or "", calibration=calibration, samples=samples, length=length,
            bos=bos, skip_unreadable=skip_unreadable, **work.fields(model, streams=False),
        )  # fmt: skip
    except KeyboardInterrupt:
        raise JobError(f"Stopped. The finished trials are in {output}: the same command continues.") from None
    best, place = found.record["best"], found.model
    verdict = "no allocator is better" if best["allocator"] == "uniform" else "better than uniform"
    say(f"Best on the held-out windows: {best['name']} ({found.loss}; {verdict}).")
    if place is not None:
        say(f"{place}: the model, pruned with it.")
        say_next(place)
    else:
        words = _options(found.record["identity"], work, output / "plan.json", calibration)
        say(f"Prune with it: billhook prune {model} {words} --output pruned")
    if as_json:
        places = {"output": str(found.output), "model": None if place is None else str(place)}
        emit({"best": best, "trials": len(found.trials), **places})


def _options(identity: dict[str, Any], work: shared.Work, plan: Path, calibration: str | None) -> str:
    """The options with which `billhook prune` does what the trials of a search did."""
    given = identity["criterion_options"].items()
    settings = [f"{k}={v}" for k, v in given if v is not None]
    options = {"--targets": work.targets, "--ignore": work.ignore, "--stacks": work.stacks, "--set": settings}
    words = ["--plan", plan, "--criterion", identity["criterion"], "--calibration", calibration]
    words += [word for option, values in options.items() for value in values or () for word in (option, value)]
    return shlex.join(map(str, words))
