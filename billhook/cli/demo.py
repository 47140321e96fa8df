"""`billhook demo`: the whole pipeline on the bundled model, in about a minute, with nothing downloaded."""

from pathlib import Path
from typing import Annotated

import typer

from billhook.cli.common import Json, emit, handle_errors, say, table

NAME = "demo"
EXAMPLES = """\b
Examples:
  billhook demo
  billhook demo --sparsity 0.5 --output ./demo-output
"""


@handle_errors
def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the pruned model goes; an earlier demo is replaced.")
    ] = Path("demo-output"),
    *,
    sparsity: Annotated[float, typer.Option(help="Fraction of the weights to remove.")] = 0.6,
    as_json: Json = False,
) -> None:
    """Measure, allocate, prune, evaluate, save, reload and verify the bundled model."""
    from billhook.demo import run_demo
    from billhook.plan.plan import check_target

    check_target(sparsity)
    result = run_demo(output, sparsity, say)
    header = ["allocator", *result.criteria]
    rows = [[name, *(f"{result.perplexity[name, c]:.2f}" for c in result.criteria)] for name in result.allocators]
    if as_json:
        emit(result.to_json())
        return
    say(
        f"Token perplexity on {result.tokens:,} held-out tokens, windows of {result.length}; the dense model has "
        f"{result.dense:.2f}."
    )
    table(f"Perplexity at sparsity {sparsity:g}", header, rows)
    best = result.best
    say("")
    say(
        f"Asked: {sparsity:.2%} of {result.weights:,} weights. Achieved: from {result.lowest:.4%} to "
        f"{result.highest:.4%}."
    )
    say(f"The best, {best[1]} with {best[0]}, is in {output}: an ordinary Hugging Face directory,")
    say("reloaded in stock transformers with the same logits, and verified.")
    say("")
    say("Next, on a model of your own (a directory with config.json and safetensors, and text like it was trained on):")
    say("  billhook prune MODEL --sparsity 0.5 --calibration text.txt --output pruned")
    say("  billhook eval pruned --data other-text.txt")
    say("  billhook verify pruned")
