"""What a race costs and gains (`--allocator auto`, `rco`, `atp --set beta=auto`): its time in prunes with the same
criterion, and the loss on held-out text.

    python benchmarks/auto.py [--model ../shared/models/babyllama-105 --tokens ../shared/golden/babyllama-105]
    [--sparsity 0.6] [--criterion admm]

Without --model the bundled model and Python source. `cost` is the processor time of measuring and choosing over that of
one prune; `excess` is log-perplexity above the dense model's.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from billhook import load_calibration, load_model
from billhook.demo import CALIBRATION, LENGTH, MODEL, SAMPLES, evaluation_windows
from billhook.evaluation.perplexity import evaluate
from billhook.steps.prune import prepare, run
from billhook.steps.prune_job import PruneRequest
from billhook.store.checkpoint import load_tokenizer

RACES = {"uniform": {}, "atp": {"beta": "auto"}, "owl": {"lam": "auto"}, "auto": {}, "rco": {}}


def main() -> None:
    """Print the trials, the cost and the gain of each race."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
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
        calibration = load_calibration(CALIBRATION, load_tokenizer(MODEL), samples=SAMPLES, length=LENGTH).ids
        text = evaluation_windows().ids
    dense = evaluate(load_model(options.model, dtype="float32"), text).nll
    prune_s = 0.0
    for allocator, given in RACES.items():
        model = load_model(options.model, dtype="float32")
        method = {"criterion": options.criterion, "allocator": allocator, "options": given}
        start = time.process_time()
        job = prepare(PruneRequest(model, options.sparsity, calibration=calibration, **method))
        chosen = time.process_time()
        run(job)
        prune_s = prune_s or time.process_time() - chosen
        racing = job.plan.made_by.get("racing", {"tried": {}, "dropped": [], "best": "uniform"})
        for name, kl in racing["tried"].items():
            print(f"  {name:<20} kl {kl:.4f} on held-out windows{', dropped' * (name in racing['dropped'])}")
        nll = evaluate(model, text).nll
        print(
            f"{allocator}: {racing['best']}, cost {(chosen - start) / prune_s:.2f} prunes of {prune_s:.1f} s, excess "
            f"{nll - dense:.4f} (perplexity {math.exp(nll):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
