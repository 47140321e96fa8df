"""What `--allocator auto` costs and gains: its time in prunes with the same criterion, and the loss on held-out text.

    python benchmarks/auto.py [--model ../shared/models/babyllama-105 --tokens ../shared/golden/babyllama-105]
    [--sparsity 0.6]

Without --model the bundled model and Python source. `cost` is the processor time of measuring and choosing over that of
one prune; gain is excess log-perplexity over the dense model's, uniform and auto.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from billhook import load_model
from billhook.evaluation.perplexity import evaluate
from billhook.steps.prune import prepare, run
from billhook.steps.request import Request, open_request


def main() -> None:
    """Print the figures and what each trial scored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "billhook" / "demo_model")
    parser.add_argument("--tokens", type=Path, help="A folder with calibration.safetensors and evaluation.safetensors.")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--criterion", default="admm")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.tokens:
        calibration, text = (
            load_file(options.tokens / f"{part}.safetensors")["tokens"].long() for part in ("calibration", "evaluation")
        )
    else:
        asked = {"samples": 32, "length": 256}
        calibration, text = (
            open_request(Request(options.model, 0.5, calibration=f"stdlib:{part}", **asked), True, "x").calibration.ids
            for part in ("train", "heldout")
        )
    dense = evaluate(load_model(options.model, dtype="float32"), text).nll
    times, losses = {}, {}
    for allocator in ("uniform", "auto"):
        request = Request(
            load_model(options.model, dtype="float32"),
            options.sparsity,
            criterion=options.criterion,
            calibration=calibration,
        )
        start = time.process_time()
        job = prepare(replace(request, allocator=allocator))
        middle = time.process_time()
        run(job)
        times[allocator] = (middle - start, time.process_time() - middle)
        losses[allocator] = evaluate(job.opened.model, text).nll - dense
    found = job.plan.made_by["auto"]
    for name, kl in found["tried"].items():
        print(f"  {name:<14} kl {kl:.4f} on held-out windows")
    for name, kl in found["foretold"].items():
        print(f"  {name}: kl {kl:.4f} foretold, the best of the published knobs")
    one = times["uniform"][1]
    print(f"cost: {times['auto'][0]:.1f} s = {times['auto'][0] / one:.2f} prunes of {one:.1f} s")
    gain = 1 - losses["auto"] / losses["uniform"]
    print(
        f"excess: uniform {losses['uniform']:.4f} ({math.exp(dense + losses['uniform']):.3f}), auto "
        f"{losses['auto']:.4f}: {gain:.0%} less"
    )


if __name__ == "__main__":
    main()
