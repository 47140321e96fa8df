"""Time `alpha_peak` of single layers: Billhook against the published procedure, interleaved in one run.

    python benchmarks/spectra.py                                   the layers of a Llama block 1024 wide, MLP 2816
    python benchmarks/spectra.py --block 7b --repeats 1 --total-only   the seven layers of LLaMA-7B's block: minutes
    python benchmarks/spectra.py --shape 4096x4096 --shape 4096x11008 --repeats 1

The published procedure (in published.py): float32 singular values, then a Python loop over cut points. The
matrices are random with a heavy-tailed spectrum: Gaussian with rows and columns scaled by power laws. Times are the
best of the repeats: `_s` is wall clock, `_cpu_s` processor time, which other busy processes disturb less; `_mib` is the
largest resident memory above that before the call. Where two bins of the histogram tie, the published choice hangs on
float32 rounding and alpha may differ by some per cent; the last column shows it.
"""

import argparse
import json
import resource
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from published import published_alpha_peak
from torch import Tensor

from billhook.measurement.weights import measure_spectra

T = TypeVar("T")
BLOCKS = {
    "1024": ["1024x1024"] * 4 + ["2816x1024"] * 2 + ["1024x2816"],
    "7b": ["4096x4096"] * 4 + ["11008x4096"] * 2 + ["4096x11008"],
}


def heavy_tailed(shape: str, seed: int) -> Tensor:
    """A float32 matrix of `OUTxIN` whose spectrum has a power-law tail."""
    rows, columns = (int(n) for n in shape.split("x"))
    generator = torch.Generator().manual_seed(seed)
    left = torch.arange(1, rows + 1)[torch.randperm(rows, generator=generator)] / rows
    right = torch.arange(1, columns + 1)[torch.randperm(columns, generator=generator)] / columns
    return torch.randn(rows, columns, generator=generator) * left[:, None] ** -0.4 * right**-0.3 * 0.02


@dataclass(frozen=True)
class Sample:
    """A layer as `measure_spectra` sees it."""

    name: str
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.weight.shape
        return rows, columns


Cost = tuple[float, float, float]  # seconds of wall clock, seconds of processor, MiB


def resident() -> float:
    """MiB of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def timed(function: Callable[[], T]) -> tuple[T, Cost]:
    """What `function` returns, and what it cost; memory is looked at every 10 ms."""
    before = highest = resident()
    ended = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(0.01):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    ended.set()
    watcher.join()
    return value, (wall, cpu, highest - before)


def compare(weights: dict[str, Tensor], repeats: int) -> dict[str, float]:
    """Both procedures over the same layers, alternating; the best times of each and the largest relative difference of
    alpha."""
    samples = [Sample(name, W) for name, W in weights.items()]
    theirs: list[Cost] = []
    ours: list[Cost] = []
    for _ in range(repeats):
        expected, spent = timed(lambda: {name: published_alpha_peak(W) for name, W in weights.items()})
        theirs.append(spent)
        got, spent = timed(lambda: measure_spectra(samples, ["alpha_peak"]))
        ours.append(spent)
    (old, old_cpu, _), (new, new_cpu, _) = (tuple(map(min, zip(*costs, strict=True))) for costs in (theirs, ours))
    difference = max(abs(got[name]["alpha_peak"] / expected[name] - 1) for name in weights)
    return {
        "published_s": old,
        "billhook_s": new,
        "ratio": old / new,
        "published_cpu_s": old_cpu,
        "billhook_cpu_s": new_cpu,
        "cpu_ratio": old_cpu / new_cpu,
        "published_mib": max(mib for _, _, mib in theirs),
        "billhook_mib": max(mib for _, _, mib in ours),
        "alpha_relative_difference": difference,
    }


def main() -> None:
    """Print one line a layer and one for all of them, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", action="append", metavar="OUTxIN", help="repeatable; default: the seven layers of --block"
    )
    parser.add_argument("--block", choices=BLOCKS, default="1024")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--total-only", action="store_true", help="only all layers together")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = options.shape or BLOCKS[options.block]
    weights = {f"{n} {shape}": heavy_tailed(shape, n) for n, shape in enumerate(shapes)}
    compare({"start the thread pools": heavy_tailed("64x64", 0)}, 1)
    groups = {} if options.total_only else {name: {name: W} for name, W in weights.items()}
    results = {}
    for name, group in {**groups, "all layers": weights}.items():
        results[name] = compare(group, options.repeats)
        if not options.json:
            print(f"{name:<14}", "  ".join(f"{key} {value:.3g}" for key, value in results[name].items()), flush=True)
    if options.json:
        print(json.dumps({"threads": options.threads, "repeats": options.repeats, "results": results}))


if __name__ == "__main__":
    main()
