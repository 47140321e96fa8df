"""`billhook search`: choose allocator and hyperparameter on held-out windows of the calibration text."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

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
)
from billhook.cli.groups import Work, grouped

NAME = "search"
EXAMPLES = """\b
Examples:
  billhook search model --sparsity 0.6 --calibration text.txt -o found
  billhook search model --sparsity 0.7 --allocator atp --grid --calibration hub:c4 -o found
  billhook search model --sparsity 0.5 --allocator atp,owl --criterion admm --budget 12 --calibration t.jsonl -o found
  billhook search model --sparsity 0.6 --budget 5m --no-model --calibration text.txt -o found
  billhook prune model --plan found/plan.json --calibration text.txt -o pruned
"""


@handle_errors
@grouped
def command(
    model: Annotated[str, typer.Argument(help="Model directory, or a name on the hub.")],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Directory for search.json, plan.json, search.svg and the pruned model/; "
            "an unfinished search is continued.",
        ),
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the prunable weights to remove, in [0, 1).")
    ] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, or N:M (keep N of every M on average).")] = "unstructured",
    allocator: Annotated[
        str,
        typer.Option(
            help="One name, several with commas, or all (alphapruning, atp, owl, dlp); auto adds the candidates of "
            "--allocator auto; uniform always takes part."
        ),
    ] = "all",
    criterion: Annotated[str, typer.Option(help="Which weights go: see billhook ls criteria.")] = "wanda",
    settings: Settings = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TRIALS|MINUTES",
            help="Trials to make beside uniform's (9), or minutes for them (5m); by default at most eight for each "
            "allocator.",
        ),
    ] = None,
    objective: Annotated[
        Literal["kl", "ppl"], typer.Option(help="Loss: KL divergence from the dense model, or perplexity.")
    ] = "kl",
    grid: Annotated[
        bool, typer.Option("--grid", help="Try the published values (ATP: beta in steps of 0.002) instead.")
    ] = False,
    finalists: Annotated[int | None, typer.Option(hidden=True)] = None,
    calibration: Calibration = None,
    samples: Annotated[
        int, typer.Option(help="Windows to draw: trials are pruned on one half and scored on the other.", min=1)
    ] = 64,
    length: Length = None,
    work: Work,
    no_model: Annotated[bool, typer.Option("--no-model", help="Write no pruned model.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start again where the output holds another search.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the allocator and hyperparameter that lose least, and prune with them."""
    from billhook.errors import BillhookError, JobError
    from billhook.steps.search import search

    if finalists is not None:
        raise BillhookError(
            "--finalists is gone: every trial is a full prune now, and --budget says how many there are."
        )
    try:
        found = search(
            model, sparsity, allocator=allocator, budget=budget, objective=objective, grid=grid,
            output=output, save_model=not no_model, overwrite=overwrite, progress=say, begin=_announce,
            pattern=pattern, criterion=criterion, options=parse_settings(settings), calibration=calibration,
            samples=samples, length=length, **work.fields(), trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise JobError(f"Stopped. The trials made so far are in {output}: the same command continues.") from None
    best = found.record["best"]
    verdict = "nothing beat it" if best["allocator"] == "uniform" else "better than uniform"
    say(f"Best on the held-out windows: {best['name']} (token perplexity {best['token_ppl']:.2f}; {verdict}).")
    if found.model is not None:
        say(
            f"{found.model}: pruned with it. Check it: billhook verify {found.model}   Score it: billhook eval "
            f"{found.model} --data SOURCE"
        )
    else:
        chosen = [
            ("--targets", work.targets),
            ("--ignore", work.ignore),
            ("--set", [f"{k}={v}" for k, v in found.record["identity"]["criterion_options"].items()]),
        ]
        words = ["--plan", output / "plan.json", "--criterion", criterion, "--calibration", calibration]
        words += [word for option, values in chosen for value in values or () for word in (option, value)]
        say(f"Prune with it: billhook prune {model} {shlex.join(map(str, words))} --output pruned")
    if as_json:
        places = {"output": str(found.output), "model": None if found.model is None else str(found.model)}
        emit({"best": best, "trials": len(found.trials), **places})


def _announce(trials: int) -> None:
    say(f"At most {trials} trials beside uniform's. Each prunes the model, so the time of the first tells that of all.")
