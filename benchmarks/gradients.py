"""Time gradients block by block against one backward pass through the whole model, with the peak memory of each.

    python benchmarks/gradients.py              random Llamas of width 1024 (MLP 2816), 8 and 16 blocks, 16 x 512 tokens
    python benchmarks/gradients.py --samples 32 --repeats 3

The plain way keeps all gradients and the two accumulators of the published code (the l1 and the l2 norm) in float32.
Each measurement is a process of its own; the two ways alternate, and the best of the repeats counts. `ratio` is
Billhook / plain, in seconds and in processor time (which other busy processes disturb less). `extra` is peak memory
above that of the loaded model; `stored` is what Billhook keeps of it for the inputs of all blocks, and with --spill-gib
on disk instead. `growth` is the extra memory of the deeper model less that of the shallower one, without the stored
inputs: what depth itself costs.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from billhook import find_layers
from billhook.engine.gradients import compute_gradients
from billhook.engine.resources import Resources
from billhook.tasks.opening import task_of

WIDTH, LENGTH, TARGET = 1024, 512, 1.4


def build(blocks: int, samples: int) -> tuple[PreTrainedModel, torch.Tensor]:
    """A random llama, float32, and tokens int64 [samples, 512]."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    shape = {"hidden_size": WIDTH, "intermediate_size": 2816, "num_hidden_layers": blocks, **heads}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=LENGTH, **shape)).eval()
    return model, torch.randint(4096, (samples, LENGTH), generator=torch.Generator().manual_seed(0))


def plain(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """One backward pass a sequence through the whole model, all gradients kept, both norms accumulated."""
    weights = [layer.module.weight for layer in find_layers(model)]
    l1, l2 = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    for ids in tokens.split(1):
        model.zero_grad(set_to_none=False)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        with torch.no_grad():
            for weight, absolute, squared in zip(weights, l1, l2, strict=True):
                absolute += weight.grad.abs()
                squared += weight.grad.square()


def once(blocks: int, samples: int, who: str, threads: int, spill_gib: float) -> None:
    """Run in a process of its own and print seconds and memory as json."""
    torch.set_num_threads(threads)
    model, tokens = build(blocks, samples)
    with torch.no_grad():
        model(tokens[:1])  # start the thread pools
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    if who == "plain":
        plain(model, tokens)
    else:
        with tempfile.TemporaryDirectory() as folder:
            place, resources = Path(folder) / "g.safetensors", Resources(spill_gib=spill_gib)
            loss = task_of(model).loss
            compute_gradients(model, tokens.split(1), "gradient_l1", place, loss=loss, resources=resources)
    seconds, cpu_s = time.perf_counter() - wall, time.process_time() - cpu
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "extra_mib": extra}))


def spawn(blocks: int, who: str, options: argparse.Namespace) -> dict[str, float]:
    """One measurement."""
    numbers = {"--samples": options.samples, "--threads": options.threads, "--spill-gib": options.spill_gib}
    arguments = [str(part) for pair in numbers.items() for part in pair]
    command = [sys.executable, __file__, "--once", str(blocks), who, *arguments]
    result: dict[str, float] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return result


def compare(blocks: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways, alternating; the best time and memory of each."""
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "billhook": []}
    for _ in range(options.repeats):
        for who, found in runs.items():
            found.append(spawn(blocks, who, options))
    best = {who: {key: min(run[key] for run in found) for key in found[0]} for who, found in runs.items()}
    ratio = {key: best["billhook"][key] / best["plain"][key] for key in ("seconds", "cpu_s")}
    stored = blocks * options.samples * LENGTH * WIDTH * 4 / 2**20
    return {
        "blocks": blocks,
        **best,
        "ratio": ratio,
        "target": TARGET,
        "stored_mib": stored if stored <= options.spill_gib * 1024 else 0.0,
    }


def main() -> None:
    """Print one line a depth and the growth, or with --json one object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", nargs=2, metavar=("BLOCKS", "WHO"), help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spill-gib", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.once:
        once(int(options.once[0]), options.samples, options.once[1], options.threads, options.spill_gib)
        return
    rows = []
    for blocks in (8, 16):
        rows.append(row := compare(blocks, options))
        if not options.json:
            old, new = row["plain"], row["billhook"]
            print(
                f"{blocks:>2} blocks  plain {old['seconds']:6.1f} s, billhook {new['seconds']:6.1f} s: ratio "
                f"{row['ratio']['seconds']:.2f} "
                f"(target {TARGET}), cpu {row['ratio']['cpu_s']:.2f}; "
                f"extra {old['extra_mib']:.0f} -> {new['extra_mib']:.0f} MiB, {row['stored_mib']:.0f} of it "
                "stored inputs",
                flush=True,
            )
    growth = {who: rows[1][who]["extra_mib"] - rows[0][who]["extra_mib"] for who in ("plain", "billhook")}
    growth["billhook"] -= rows[1]["stored_mib"] - rows[0]["stored_mib"]
    if options.json:
        print(json.dumps({"threads": options.threads, "samples": options.samples, "rows": rows, "growth_mib": growth}))
    else:
        print(
            f"growth with depth, stored inputs aside: plain {growth['plain']:.0f} MiB, billhook "
            f"{growth['billhook']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
