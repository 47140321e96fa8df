"""Time a full ATP search against one plain prune of the same model, in one run.

    python benchmarks/search.py                     a random llama of 8 blocks x 1024 (MLP 2816) and the bundled model,
    Wanda, 60 % python benchmarks/search.py --model demo --windows 32 --length 512

The search is everything: statistics, nine cheap trials, and the two full runs (uniform and the best) with their scores.
`ratio` is its time over that of one prune with `--windows` windows of `--length` tokens. A search draws half as many
windows as a prune by default (64 and 128), and so it does here, of fewer tokens; `--same` adds one that draws as many.
`cpu` is processor time, which other busy processes disturb less. Each measurement is a process of its own, the best of
the repeats counts. The published way costs nine runs with an evaluation each.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from prune import SPARSITY, build

from billhook import allocate, measure, prune_, search


def once(name: str, what: str, windows: int, length: int, threads: int) -> None:
    """Run in a process of its own and print seconds, and the trials made, as json."""
    torch.set_num_threads(threads)
    model, _ = build(name)
    tokens = torch.randint(model.config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(tokens[:1])  # start the thread pools
    lines: list[tuple[float, str]] = []
    start, cpu = time.perf_counter(), time.process_time()
    if what == "prune":
        prune_(model, allocate(measure(model, []), SPARSITY), criterion="wanda", batches=list(tokens.split(8)))
    else:
        search(
            model,
            SPARSITY,
            allocator="atp",
            calibration=tokens,
            progress=lambda line: lines.append((time.perf_counter() - start, line)),
        )
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    cheap = max((at for at, line in lines if line.startswith("trial")), default=0.0)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_s": cpu_s,
                "cheap_s": cheap,
                "trials": sum(line.startswith("trial") for _, line in lines) - 1,
            }
        )
    )


def spawn(*arguments: object) -> dict[str, float]:
    """One measurement."""
    command = [sys.executable, __file__, "--once", *map(str, arguments)]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return result


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--once", nargs=5, metavar=("MODEL", "WHAT", "WINDOWS", "LENGTH", "THREADS"), help=argparse.SUPPRESS
    )
    parser.add_argument("--model", choices=["random", "demo"], action="append")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.once:
        name, what, *numbers = options.once
        once(name, what, *map(int, numbers))
        return
    jobs = {"prune": ("prune", options.windows), "search": ("search", options.windows // 2)}
    jobs |= {"same windows": ("search", options.windows)} if options.same else {}
    for name in options.model or ["random", "demo"]:
        runs: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
        for _ in range(options.repeats):
            for job, arguments in jobs.items():
                runs[job].append(spawn(name, *arguments, options.length, options.threads))
        best = {job: min(found, key=lambda r: r["seconds"]) for job, found in runs.items()}
        ratios = {
            job: {unit: best[job][unit] / best["prune"][unit] for unit in ("seconds", "cpu_s")}
            for job in jobs
            if job != "prune"
        }
        if options.json:
            print(json.dumps({"model": name, "windows": options.windows, **best, "ratio": ratios}), flush=True)
            continue
        for job, ratio in ratios.items():
            run = best[job]
            print(
                f"{name:<7} {job:<12} prune {best['prune']['seconds']:7.2f} s, ATP search {run['seconds']:7.2f} "
                f"s ({run['trials']} trials, "
                f"{run['cheap_s']:.2f} s up to the last): ratio {ratio['seconds']:.2f} (target 2), cpu "
                f"{ratio['cpu_s']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
