"""`billhook demo`: all steps on the bundled model, in about a minute, with nothing downloaded."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import emit, say, say_notes, table
from billhook.cli.options import Json, fraction, output_option

NAME = "demo"
EXAMPLES = """\b
Examples:
  billhook demo
  billhook demo --sparsity 0.5 --output ./demo-output
"""


def command(
    output: Annotated[Path, output_option("Directory of the pruned model; an earlier demo is replaced.")] = Path(
        "demo-output"
    ),
    *,
    sparsity: Annotated[
        float, typer.Option(parser=fraction, metavar="FRACTION", help="Of the weights to remove.")
    ] = 0.6,
    as_json: Json = False,
) -> None:
    """Measure, allocate, prune, evaluate, save, reload and verify the bundled model."""
    from billhook.demo import run_demo
    from billhook.plan.plan import check_target

    check_target(sparsity)
    result = run_demo(output, sparsity, say)
    if as_json:
        return emit(result.to_json())
    found, windows = result.perplexity, f"{result.tokens:,} held-out tokens, windows of {result.length}"
    say(f"\nToken perplexity on {windows}; the dense model has {result.dense:.2f}. The first is the default recipe.")
    rows = [
        [a, *(f"{found[a, c]:.2f}" if (a, c) in found else "-" for c in result.criteria)] for a in result.allocators
    ]
    table(f"Perplexity at sparsity {sparsity:g}", ["allocator", *result.criteria], rows)
    say_notes(result.notes)
    achieved = result.achieved.values()
    say(f"\nTarget: {sparsity:.2%} of {result.weights:,} weights. Removed: {min(achieved):.4%} to {max(achieved):.4%}.")
    say(f"The model of the default recipe is in {output}: an ordinary Hugging Face directory,")
    say("verified, and scored as stock transformers opens it.\n")
    say("Next, on a model of your own (a directory with config.json and safetensors, and text like its training text):")
    say("  billhook prune MODEL --sparsity 0.5 --calibration text.txt --output pruned")
    say("  billhook eval pruned --data other-text.txt")
    say("  billhook verify pruned")
