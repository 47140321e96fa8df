"""Time whole runs: Billhook against the published procedure, in one run, with the peak memory of each.

    python benchmarks/prune.py      a random Llama of 8 blocks x 1024 (MLP 2816), 32 x 512 tokens, and the bundled model
    python benchmarks/prune.py --model demo --only wanda

Each measurement is a process of its own, so that peak memory is its own; the two procedures alternate, and the best of
the repeats counts. `ratio` is published / Billhook: above 1 Billhook is faster. Loading and evaluation are not counted.
`cpu` is processor time, which other busy processes disturb less than the clock. `extra` is peak memory above that of
the loaded model.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from published import published_alpha_peak, published_run
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from billhook import allocate, find_layers, load_model, measure, prune_
from billhook.steps.batch_size import batch_size

TARGETS = {"wanda": 2.0, "alpha_peak": 3.0, "sparsegpt": 1.5}
SPARSITY = 0.6


def build(name: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """The model, float32, and its calibration tokens int64 [32, length]."""
    generator = torch.Generator().manual_seed(0)
    if name == "demo":
        model = load_model(Path(__file__).parents[1] / "billhook" / "demo_model", dtype="float32")
        return model, torch.randint(model.config.vocab_size, (32, 512), generator=generator)
    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, **heads}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=512, **shape)).eval()
    return model, torch.randint(4096, (32, 512), generator=generator)


@torch.no_grad()
def work(model: PreTrainedModel, tokens: torch.Tensor, what: str, who: str) -> None:
    """Do one job once, the published way or ours."""
    layers = find_layers(model)
    if what == "alpha_peak":
        if who == "published":
            for layer in layers:
                published_alpha_peak(layer.weight)
        else:
            measure(model, ["alpha_peak"])
    elif who == "published":
        published_run(model, list(tokens.split(1)), what, SPARSITY)
    else:
        size = batch_size(find_layers(model), tokens.shape[1])
        prune_(model, allocate(measure(model, []), SPARSITY), criterion=what, batches=list(tokens.split(size)))


def once(model_name: str, what: str, who: str, threads: int) -> None:
    """Run in a process of its own and print seconds and peak memory as json."""
    torch.set_num_threads(threads)
    model, tokens = build(model_name)
    with torch.no_grad():
        model(tokens[:1])  # start the thread pools
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    work(model, tokens, what, who)
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps({"seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak / 1024, "extra_mib": (peak - loaded) / 1024})
    )


def spawn(model: str, what: str, who: str, threads: int) -> dict[str, float]:
    """One measurement."""
    command = [sys.executable, __file__, "--once", model, what, who, "--threads", str(threads)]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return result


def compare(model: str, what: str, repeats: int, threads: int) -> dict[str, Any]:
    """Both procedures, alternating; the best time and memory of each."""
    runs: dict[str, list[dict[str, float]]] = {"published": [], "billhook": []}
    for _ in range(repeats):
        for who, found in runs.items():
            found.append(spawn(model, what, who, threads))
    best = {who: {key: min(run[key] for run in found) for key in found[0]} for who, found in runs.items()}
    ratios = {
        key: best["published"][key] / max(best["billhook"][key], 1e-9) for key in ("seconds", "cpu_s", "peak_mib")
    }
    return {
        "model": model,
        "what": what,
        **best,
        "ratio": ratios,
        "target": TARGETS[what] if model == "random" else None,
    }


def main() -> None:
    """Print one line a job, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", nargs=3, metavar=("MODEL", "WHAT", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=["random", "demo"], action="append")
    parser.add_argument("--only", choices=list(TARGETS), action="append")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.once:
        once(*options.once, options.threads)
        return
    rows = []
    for model in options.model or ["random", "demo"]:
        for what in options.only or TARGETS:
            rows.append(row := compare(model, what, options.repeats, options.threads))
            if not options.json:
                old, new, ratio = row["published"], row["billhook"], row["ratio"]
                goal = f" (target {row['target']})" if row["target"] else ""
                print(
                    f"{model:<7} {what:<11} {old['seconds']:8.2f} s -> {new['seconds']:8.2f} s  ratio "
                    f"{ratio['seconds']:5.2f}{goal}, "
                    f"cpu {ratio['cpu_s']:5.2f}; peak {old['peak_mib']:.0f} -> {new['peak_mib']:.0f} MiB "
                    f"(extra {old['extra_mib']:.0f} -> {new['extra_mib']:.0f})",
                    flush=True,
                )
    if options.json:
        print(json.dumps({"threads": options.threads, "repeats": options.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
