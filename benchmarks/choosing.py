"""What the costs of layers' errors are worth for the choice of storage types: KL divergence and time of four choices.

    python benchmarks/choosing.py [--folder ../shared] [--model babyllama-105] [--bits 3.25]

int2 to int6 by layer, in as many bytes as a mean of `--bits` with groups of 64. The errors of all layers and types are
measured once. `uniform` is one type everywhere, raised as far as the bytes allow; `even` counts a relative error alike
in every layer; `fisher` is what `billhook compress` does: costs by the Fisher information of the layers' outputs;
`race` takes costs from quantized models on half of the text, in up to three rounds, and the best on the other half.

Calibrated on `golden/*/calibration`, scored on `golden/*/evaluation` only, each quantized by GPTQ with its defaults,
block by block in float32, in one thread. Times are processor time.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from bits import MODELS, Bench

from billhook.architectures.layers import find_layers
from billhook.engine.method import Quantization
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.scoring import NEXT_TOKEN
from billhook.measurement.fisher import fisher
from billhook.measurement.level_errors import level_errors
from billhook.methods.quantize import QUANTIZERS
from billhook.plan.level_allocators import allocate_levels
from billhook.plan.levels import Levels
from billhook.plan.plan import Plan
from billhook.racing.levels import choose_types
from billhook.steps.types import uniform_plan
from billhook.tasks.base import Samples
from billhook.trials.heldout import split_samples


def choices(bench: Bench, bits: float) -> Iterator[tuple[str, Plan, float]]:
    """Names, plans, and the seconds that each took beside those of the errors."""
    model, method = bench.dense, Quantization("gptq", QUANTIZERS.configure("gptq", {"sweeps": 0}))
    layers = find_layers(model)
    shapes = {layer.name: layer.shape for layer in layers}
    menus = {n: [f"int{b}/{64 if s[1] % 64 == 0 else 32}" for b in range(2, 7)] for n, s in shapes.items()}
    budget = int(uniform_plan("int3/64", layers)[0].bytes(shapes) * bits / 3.25)
    start = time.process_time()
    found = level_errors(model, layers, bench.batches, menus)
    print(f"  errors {time.process_time() - start:.1f} s", flush=True)
    levels = Levels(shapes, menus, budget, errors=found.errors, weights=dict.fromkeys(shapes, 1.0))

    def by_fisher() -> Plan:
        information = fisher(model, layers, bench.batches, NEXT_TOKEN)
        costs = {name: 0.5 * f * found.power[name] for name, f in information.items()}
        return allocate_levels(replace(levels, weights=costs))

    def by_race() -> Plan:
        samples = Samples({"input_ids": bench.calibration}, "golden", "golden", "given")
        return choose_types(model, layers, split_samples(model, samples, 8, 0), levels, method).plan

    ways: dict[str, Callable[[], Plan]] = {
        "uniform": lambda: allocate_levels(levels, "uniform"),
        "even": lambda: allocate_levels(levels),
        "fisher": by_fisher,
        "race": by_race,
    }
    for name, way in ways.items():
        start = time.process_time()
        yield name, way(), time.process_time() - start


def main() -> None:
    """Print a line for every choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--bits", action="append", type=float)
    options = parser.parse_args()
    torch.set_num_threads(1)
    method = Quantization("gptq", QUANTIZERS.configure("gptq", {}))
    for model in options.model or MODELS:
        bench = Bench(options.folder, model)
        for bits in options.bits or [2.5, 3.25, 4.25]:
            print(f"{model}, {bits} bits", flush=True)
            for name, plan, seconds in choices(bench, bits):
                start = time.process_time()
                quantized, _ = bench.quantized(plan, method)
                took = time.process_time() - start
                found = evaluate(quantized, bench.evaluation, against=bench.dense)
                assert found.against is not None
                loss = f"KL {found.against.kl:.4f}, excess {found.nll - found.against.nll:.4f}"
                print(f"  {name:8} {loss}, chosen in {seconds:.1f} s, quantized in {took:.1f} s", flush=True)


if __name__ == "__main__":
    main()
