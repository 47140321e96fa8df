"""Time mask selection and SparseGPT on single layers: Billhook against the published procedure, interleaved in one run.

    python benchmarks/selection.py                             the layers of a Llama block 1024 wide, MLP 2816
    python benchmarks/selection.py --shape 4096x4096 --repeats 1 --only select

The published procedures (in published.py): a stable full sort per row (Wanda's masks), a full sort of the layer
(magnitude's), and SparseGPT's column loop with its two Cholesky factorizations and an inverse. Weights are random,
inputs correlated. Times are the best of the repeats, in seconds of wall clock. `equal` says that masks agree
(SparseGPT: the fraction of equal mask entries in float32).
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from published import published_groups, published_layer, published_rows, published_sparsegpt
from torch import Tensor

from billhook.methods.masks import Select
from billhook.methods.sparse.sparsegpt import sparsegpt
from billhook.methods.statistics import LayerStats

LLAMA_1024 = ["1024x1024", "2816x1024", "1024x2816"]
SPARSITY = 0.6


def cases(rows: int, columns: int, only: str) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name -> (published, Billhook), both returning a keep mask or pruned weights."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, columns, generator=generator)
    score, shape = W.abs(), (rows, columns)
    zeros = round(SPARSITY * W.numel())
    row = Select(shape, SPARSITY, zeros, None, "row", "floor")
    layer = Select(shape, SPARSITY, zeros, None, "layer", "floor")
    pairs = Select(shape, 0.5, W.numel() // 2, (2, 4))
    found: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {}
    if only != "sparsegpt":
        found["select row"] = (lambda: published_rows(score, SPARSITY), lambda: row(score))
        found["select layer"] = (lambda: published_layer(score, SPARSITY), lambda: layer(score))
        found["select 2:4"] = (lambda: published_groups(score, 2, 4), lambda: pairs(score))
    if only != "select":
        x = torch.randn(2 * columns, columns, generator=generator)
        x += torch.randn(2 * columns, 64, generator=generator) @ torch.randn(64, columns, generator=generator) / 8
        stats = LayerStats(len(x), 1, gram=x.T @ x)
        gram = stats.gram
        assert gram is not None
        found["sparsegpt"] = (lambda: published_sparsegpt(W, gram, SPARSITY, None), lambda: sparsegpt(W, stats, layer))
        found["sparsegpt 2:4"] = (lambda: published_sparsegpt(W, gram, 0.5, (2, 4)), lambda: sparsegpt(W, stats, pairs))
    return found


def timed(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the seconds of one call."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def main() -> None:
    """Print the table, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", action="append", metavar="OUTxIN", help="repeatable; default: the layer shapes of a block"
    )
    parser.add_argument("--only", choices=["select", "sparsegpt", "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = []
    for shape in options.shape or LLAMA_1024:
        rows, columns = (int(n) for n in shape.split("x"))
        for name, (published, billhook) in cases(rows, columns, options.only).items():
            runs = [(timed(published), timed(billhook)) for _ in range(options.repeats)]
            old, new = min(r[0][1] for r in runs), min(r[1][1] for r in runs)
            equal = float(((runs[0][0][0] != 0) == (runs[0][1][0] != 0)).float().mean())
            lines.append(
                {
                    "shape": shape,
                    "what": name,
                    "published_s": old,
                    "billhook_s": new,
                    "ratio": old / new,
                    "equal": equal,
                }
            )
            if not options.json:
                print(
                    f"{shape:>10}  {name:<14} published {old:8.3f}  billhook {new:8.3f}  ratio {old / new:6.2f}  "
                    f"equal {equal:.6f}",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"layers": lines, "threads": options.threads, "sparsity": SPARSITY}))


if __name__ == "__main__":
    main()
