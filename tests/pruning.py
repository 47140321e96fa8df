"""Prune by the command line, and verify the result."""

from pathlib import Path

from command import done

TEXT = ("--samples", "5", "--length", "32")


def prune(place: Path, output: Path, *arguments: str, model: str = "model") -> dict:
    """Prune with a text (and Wanda and sparsity 0.5 unless the arguments say otherwise); the JSON object printed."""
    sparsity = [] if {"--sparsity", "--pattern", "--plan"} & set(arguments) else ["--sparsity", "0.5"]
    criterion = [] if {"--criterion", "--recipe"} & set(arguments) else ["--criterion", "wanda"]
    text = ["--calibration", str(place / "text.txt"), *TEXT]
    return done("prune", place / model, "--output", output, *text, *sparsity, *criterion, *arguments, "--json").json
