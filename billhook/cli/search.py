"""`billhook search`: choose allocator and knob on held-out windows of the calibration text."""

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
            "an unfinished search goes on.",
        ),
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of the prunable weights to remove, in [0, 1).")
    ] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, or N:M (keep N of every M on average).")] = "unstructured",
    allocator: Annotated[
        str,
        typer.Option(
            help="One name, several with commas, or all (alphapruning, atp, owl, dlp); uniform always takes part."
        ),
    ] = "all",
    criterion: Annotated[str, typer.Option(help="Which weights go: see billhook ls criteria.")] = "wanda",
    settings: Settings = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TRIALS|MINUTES",
            help="Cheap trials to make (9) or minutes for them (5m); by default nine for each knob.",
        ),
    ] = None,
    objective: Annotated[
        Literal["kl", "ppl"], typer.Option(help="Loss: divergence from the dense model, or perplexity.")
    ] = "kl",
    grid: Annotated[
        bool, typer.Option("--grid", help="Try the published values (ATP: beta in steps of 0.002), giving up none.")
    ] = False,
    finalists: Annotated[
        int, typer.Option(help="Best trials of each allocator that are pruned properly, beside uniform.")
    ] = 1,
    calibration: Calibration = None,
    samples: Annotated[
        int, typer.Option(help="Windows to draw: one half calibrates, the other is held out.", min=1)
    ] = 64,
    length: Length = None,
    work: Work,
    no_model: Annotated[bool, typer.Option("--no-model", help="Write no pruned model.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Start again where the output holds another search.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the allocator and knob that lose least, and prune with them."""
    from billhook.errors import JobError
    from billhook.steps.search import search, summary

    try:
        found = search(
            model, sparsity, allocator=allocator, budget=budget, objective=objective, grid=grid, finalists=finalists,
            output=output, save_model=not no_model, overwrite=overwrite, progress=say, pattern=pattern,
            criterion=criterion, options=parse_settings(settings), calibration=calibration, samples=samples,
            length=length, **work.fields(), trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise JobError(f"Stopped. What was found so far is in {output}: the same command goes on from there.") from None
    best = found.record["best"]
    options = " ".join(f"{key}={value}" for key, value in best["options"].items())
    verdict = "nothing beat it" if best["allocator"] == "uniform" else "better than uniform"
    say(
        f"Best on the held-out windows: {best['allocator']} {options} (token perplexity {best['token_ppl']:.2f}; "
        f"{verdict})."
    )
    if found.model is not None:
        say(
            f"{found.model}: pruned with it. Check it: billhook verify {found.model}   Score it: billhook eval "
            f"{found.model} --data SOURCE"
        )
    chosen = [
        ("--targets", work.targets),
        ("--ignore", work.ignore),
        ("--set", [f"{k}={v}" for k, v in found.record["identity"]["criterion_options"].items()]),
    ]
    words = ["--plan", output / "plan.json", "--criterion", criterion, "--calibration", calibration]
    words += [word for option, values in chosen for value in values or () for word in (option, value)]
    say(f"Prune again, with all windows: billhook prune {model} {shlex.join(map(str, words))} --output pruned")
    if as_json:
        emit(dict(summary(found)))
