"""Time the solvers on single layers: admm against SparseGPT, SparseGPT against a plain column loop, in one run.

    python benchmarks/solvers.py                      1024 x 1024 and 2816, and 4096 x 4096
    python benchmarks/solvers.py --layer 4096x11008 --no-loop

Random weights and inputs (twice as many tokens as inputs), 60 %; the best of the repeats, in seconds. `admm` is to take
at most 3 times as long as SparseGPT, and SparseGPT at most half as long as the loop. `extra` is peak memory above that
of weight and Gram matrix. `loss` is the layer's squared error relative to SparseGPT's. For whole runs on a random llama
see `benchmarks/prune.py --only sparsegpt --only admm`.
"""

import argparse
import resource
import time
from collections.abc import Callable

import torch
from published import published_sparsegpt
from torch import Tensor

from billhook.methods.least_squares import loss
from billhook.methods.masks import Select
from billhook.methods.sparse.admm import admm
from billhook.methods.sparse.sparsegpt import sparsegpt
from billhook.methods.statistics import LayerStats

SPARSITY = 0.6


def best(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor, float]:
    """Seconds, result, and MiB by which the peak memory of the process rose."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print one line a layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", action="append", metavar="OUTxIN")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-loop", action="store_true", help="Leave the plain column loop out.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.layer or ["1024x1024", "1024x2816", "4096x4096"]:
        rows, columns = map(int, name.split("x"))
        generator = torch.Generator().manual_seed(0)
        gram, tokens = torch.zeros(columns, columns), 0
        while tokens < 2 * columns:
            x = torch.randn(1024, columns, generator=generator)
            gram.addmm_(x.T, x)
            tokens += 1024
        W = torch.randn(rows, columns, generator=generator)
        select = Select((rows, columns), SPARSITY, round(SPARSITY * W.numel()), None, "row")
        stats = LayerStats(tokens, 1, gram=gram)
        old, V, memory = best(lambda: sparsegpt(W, stats, select), options.repeats)  # noqa: B023
        new, U, more = best(lambda: admm(W, stats, select), options.repeats)  # noqa: B023
        ratio = float(loss(W, U, gram).sum() / loss(W, V, gram).sum())
        line = f"{name}: sparsegpt {old:.2f} s (extra {memory:.0f} MiB), "
        line += f"admm {new:.2f} s = {new / old:.2f} x (extra {more:.0f} MiB more), loss {ratio:.3f}"
        if not options.no_loop:
            loop = best(lambda: published_sparsegpt(W, gram, SPARSITY, None), 1)[0]  # noqa: B023
            line += f"; column loop {loop:.2f} s = {loop / old:.2f} x sparsegpt"
        print(line, flush=True)


if __name__ == "__main__":
    main()
