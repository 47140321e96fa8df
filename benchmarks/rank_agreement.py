"""Do cheap trials rank plans as full runs do? And what does the searched knob gain, on text that nothing was chosen by?

    python benchmarks/rank_agreement.py MODEL CALIBRATION EVALUATION [--sparsity 0.5 0.6 0.7] [--allocator atp owl
    alphapruning]

For each sparsity and allocator: Spearman's and Kendall's rank correlation over `--points` of the knob and uniform
between the cheap trial's divergence, on as many held-out windows as a search scores it on, and that of a full run on
all of them, and between the cheap trial and the perplexity of the full run on `--windows` windows spread over the
evaluation text. Then that perplexity for uniform, the default knob, the searched knob and the best of these points, all
pruned with the calibration half. CALIBRATION and EVALUATION are sources as on the command line. One json object a line.
"""

import argparse
import json
from collections.abc import Sequence

import torch

from billhook import evaluate, load_windows, search
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.plan import Plan
from billhook.racing.contest import UNIFORM, trial_windows
from billhook.racing.knobs import TICKS, Candidate
from billhook.steps.request import Request
from billhook.steps.search import Task
from billhook.store.checkpoint import load_tokenizer, resolve


def ranks(values: Sequence[float]) -> torch.Tensor:
    """Positions in ascending order, float64; there are no ties among losses."""
    return torch.tensor(values, dtype=torch.float64).argsort().argsort().double()


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Share of pairs in the same order minus share of pairs in the other."""
    signs = [(torch.tensor(x)[:, None] - torch.tensor(x)[None]).sign() for x in (a, b)]
    return float((signs[0] * signs[1]).sum()) / (len(a) * (len(a) - 1))


def cells(options: argparse.Namespace, sparsity: float) -> None:
    """Print all numbers for one sparsity."""
    fields = {
        "calibration": options.calibration,
        "samples": options.samples,
        "length": options.length,
        "criterion": options.criterion,
    }
    task = Task(Request(options.model, sparsity, **fields), tuple(options.allocator), "kl", False)
    windows = load_windows(options.evaluation, load_tokenizer(resolve(options.model)), length=options.length).ids
    windows = windows[:: max(1, len(windows) // options.windows)][: options.windows]
    bench, count = task.bench, len(task.split.heldout)

    def trial(candidate: Candidate) -> float:
        bench.trial(task.plan(candidate))
        return sum(bench.losses(0, trial_windows(count)).kl)

    def full(plan: Plan) -> tuple[float, float]:
        bench.prune(plan)
        return sum(bench.losses(0, count).kl), evaluate(bench.model, windows).token_ppl

    dense = evaluate(bench.model, windows).token_ppl
    uniform = (trial(UNIFORM), *full(task.plan(UNIFORM)))
    for name in options.allocator:
        points = [
            task.space.at(name, tick) for tick in range(TICKS // options.points, TICKS + 1, TICKS // options.points)
        ]
        cheap, held, test = zip(uniform, *((trial(c), *full(task.plan(c))) for c in points), strict=True)
        default = full(task.plan(Candidate(name, ALLOCATORS.configure(name, {}))))[1]
        found = search(options.model, sparsity, allocator=name, **fields)
        correlations = {
            "spearman": spearman(cheap, held),
            "kendall": kendall(cheap, held),
            "spearman_test": spearman(cheap, test),
        }
        line = {"model": options.model.rpartition("/")[2], "sparsity": sparsity, "allocator": name}
        line |= {key: round(value, 3) for key, value in correlations.items()}
        ppl = {
            "dense": dense,
            "uniform": uniform[2],
            "default": default,
            "searched": full(found.plan)[1],
            "best": min(test),
        }
        line |= {key: round(value, 2) for key, value in ppl.items()} | {
            "trials": len(found.trials) - 1,
            "found": found.record["best"]["options"],
        }
        print(json.dumps(line), flush=True)


def main() -> None:
    """Print a line for each sparsity and allocator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "calibration", "evaluation"):
        parser.add_argument(name)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6, 0.7])
    parser.add_argument("--allocator", nargs="+", default=["atp", "owl", "alphapruning"])
    parser.add_argument("--criterion", default="wanda")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--points", type=int, default=10, help="a divisor of 40")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    options = parser.parse_args()
    for sparsity in options.sparsity:
        with torch.no_grad():
            cells(options, sparsity)


if __name__ == "__main__":
    main()
