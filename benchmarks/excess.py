"""How much of the best published run's loss is left: excess log-perplexity on the golden text, relative to the best
published run.

    python benchmarks/excess.py [--folder ../shared] [--model stories260k] [--sparsity 0.6] [--way admm --way auto ...]
    [--written 96]

Excess is ln(perplexity / dense) on `golden/*/evaluation`, calibrated on `golden/*/calibration` only; the ratio is to
the best published run of that sparsity in the same `reference.json`, at 70 % to Billhook's own uniform SparseGPT. `2:4`
and `4:8` are compared with Wanda's published run. `--written` adds windows that the model writes itself to the golden
ones. One line per run, and a Markdown table at the end.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from billhook import load_model, prune
from billhook.evaluation.perplexity import evaluate
from billhook.tasks.self_text import write_windows

MODELS = ("stories260k", "babyllama-105", "c4gut-llama-12x128", "c4gut-llama-8x128")
WAYS = {
    "sparsegpt": {"criterion": "sparsegpt"},
    "admm": {"criterion": "admm"},
    "auto": {"criterion": "admm", "allocator": "auto"},
    "refine": {"criterion": "admm", "refine": "blocks+norms"},
    "auto+refine": {"criterion": "admm", "allocator": "auto", "refine": "blocks+norms"},
}


def reference(folder: Path, model: str, what: str) -> float | None:
    """The excess of the published run that counts, or None at sparsities where there is none."""
    golden = json.loads((folder / "golden" / model / "reference.json").read_text())
    runs = {
        tag: math.log(run["ppl"] / golden["ppl_dense"])
        for tag, run in golden["runs"].items()
        if tag.endswith(f"_{what}")
    }
    return runs.get(f"wanda_{what}") if ":" in what else min(runs.values(), default=None)


def excess(folder: Path, name: str, what: str, way: str, written: int = 0) -> tuple[float, float]:
    """Excess log-perplexity and seconds of one run, the writing apart; with `written` windows of the model's own."""
    golden = folder / "golden" / name
    dense = json.loads((golden / "reference.json").read_text())["ppl_dense"]
    model = load_model(folder / "models" / name, dtype="float32")
    asked = {"pattern": what} if ":" in what else {"sparsity": float(what)}
    calibration = load_file(golden / "calibration.safetensors")["tokens"].long()
    if written:
        calibration = torch.cat([calibration, write_windows(model, written, calibration.shape[1])])
    start = time.perf_counter()
    prune(model, calibration=calibration, **asked, **WAYS[way])
    seconds = time.perf_counter() - start
    nll = evaluate(model, load_file(golden / "evaluation.safetensors")["tokens"].long()).nll
    return nll - math.log(dense), seconds


def main() -> None:
    """Print every run as it ends, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--sparsity", action="append", help="such as 0.6 or 2:4")
    parser.add_argument("--way", action="append", choices=list(WAYS))
    parser.add_argument("--written", type=int, default=0, help="additional windows that the model writes itself")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ways, rows = options.way or list(WAYS), []
    for model in options.model or MODELS:
        for what in options.sparsity or ["0.5", "0.6", "0.7", "2:4", "4:8"]:
            base = reference(options.folder, model, what) or excess(options.folder, model, what, "sparsegpt")[0]
            cells = []
            for way in ways:
                value, seconds = excess(options.folder, model, what, way, options.written)
                cells.append(f"{value / base:.2f}")
                print(
                    f"{model} {what} {way}: excess {value:.4f}, {value / base:.3f} of {base:.4f}, {seconds:.1f} s",
                    flush=True,
                )
            rows.append(f"| {model} | {what} | {base:.3f} | {' | '.join(cells)} |")
    print(f"| model | removed | excess of reference | {' | '.join(ways)} |")
    print("| --- | --- | --- |" + " --- |" * len(ways))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
