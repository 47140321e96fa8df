"""Perplexity after whole units are removed, on the golden windows: every method, and what its parts give.

    python benchmarks/structured.py MODEL [--golden DIR] [--remove 0.25] [--units channels,heads] [--units channels]

DIR (by default MODEL's name below ../shared/golden) holds calibration.safetensors and evaluation.safetensors with
`tokens` [windows, length]; 32 windows calibrate, 16 are scored. Times are processor time.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import find_units
from billhook.engine.removal import Removal, dropping, remove_parts_
from billhook.engine.restore import restored
from billhook.methods.structured import STRUCTURED
from billhook.plan.table import Table
from billhook.plan.unit_counts import Shape, Size, proportional, uniform_counts
from billhook.racing.units import UnitProblem
from billhook.steps.block_choice import BlockChoice, BlockOrder
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import open_request
from billhook.steps.slim_allocation import UnitAllocation, allocate_units, sizes_of
from billhook.tasks.opening import load_model

CASES = {
    "magnitude": ("magnitude", {}),
    "wanda_sp": ("wanda_sp", {}),
    "wanda_sp with least squares": ("wanda_sp", {"least_squares": True}),
    "obs, no dense target": ("obs", {"dense_target": 0.0}),
    "obs, no swaps": ("obs", {"swaps": 0}),
    "obs": ("obs", {}),
}


@torch.no_grad()
def perplexity(model: torch.nn.Module, tokens: Tensor) -> float:
    """Of all tokens but the first of each window."""
    logits = model(tokens).logits[:, :-1].float().log_softmax(-1)
    return math.exp(-float(logits.gather(-1, tokens[:, 1:, None]).mean()))


def score(
    model: Path, kinds: Sequence[str], remove: float, case: tuple[str, Mapping[str, float]], golden: Path
) -> tuple[float, float, str]:
    """Perplexity, seconds of processor time, and how many parts stay."""
    tokens = [load_file(golden / f"{name}.safetensors")["tokens"].long() for name in ("calibration", "evaluation")]
    whole = load_model(model, dtype="float32")
    units = find_units(whole, kinds)
    sizes = [Size(u.name, u.kind, u.block, u.count, u.parameters) for u in units]
    total = sum(p.numel() for block in blocks_of(whole).values() for p in block.parameters())
    counts = uniform_counts(sizes, round(remove * total), proportional(sizes, kinds))
    removal = Removal(case[0], STRUCTURED.configure(case[0], case[1]))
    begun = time.process_time()
    remove_parts_(whole, units, counts, removal, [{"input_ids": part} for part in tokens[0][:32].split(8)])
    took = time.process_time() - begun
    stays = dict.fromkeys(f"{counts[u.name]}/{u.count} {u.kind}" for u in units)
    return perplexity(whole, tokens[1][:16]), took, ", ".join(stays)


def score_allocations(model: Path, kinds: Sequence[str], remove: float, shape: Shape, golden: Path) -> None:
    """Print perplexity where measured curves and trials decide what each unit keeps, and for schedules over depth."""
    tokens = [load_file(golden / f"{name}.safetensors")["tokens"].long() for name in ("calibration", "evaluation")]
    request = ModelRequest(model, calibration=tokens[0][:32], batch_size=8, dtype="float32")
    opened = open_request(request, True, "The benchmark", streamed=False)
    units = find_units(opened.model, kinds)
    sizes, depth = sizes_of(units, opened.model.config), len(blocks_of(opened.model))
    total = sum(p.numel() for block in blocks_of(opened.model).values() for p in block.parameters())
    left = round(remove * total)
    sparsity = left / sum(s.n for s in sizes)
    problem = UnitProblem(Table(()), sparsity, sizes=sizes, remove=left, shape=shape, stays=total - left)
    removal, begun = Removal("obs", STRUCTURED.configure("obs", {})), time.process_time()
    plans = {"auto": allocate_units(UnitAllocation("auto", {}, shape), opened, units, problem, removal)}
    took = time.process_time() - begun
    for name, slope in (("uniform", 0.0), ("rising", 1.0), ("falling", -1.0)) if shape == "per-layer" else ():
        fractions = {s.name: sparsity * (1 + slope * (2 * s.block / (depth - 1) - 1) * 0.7) for s in sizes}
        plans[name] = problem.plan(fractions, "explicit", {})
    for name, plan in plans.items():
        with restored([unit.consumer for unit in units if unit.consumer is not None]):
            remove_parts_(opened.model, units, plan.units, removal, opened.batches)
            ppl, counts = perplexity(opened.model, tokens[1][:16]), [plan.units[u.name] for u in units]
        print(f"{shape} {','.join(kinds)} {name}: {ppl:.3f} {counts}", flush=True)
    print(f"{took:.1f} s for auto's plan", flush=True)


def score_blocks(model: Path, remove: float, by: BlockChoice, golden: Path) -> tuple[list[int], float, float]:
    """The blocks dropped, and perplexity without and with the refit of what follows."""
    tokens = [load_file(golden / f"{name}.safetensors")["tokens"].long() for name in ("calibration", "evaluation")]
    request = ModelRequest(model, calibration=tokens[0][:32], batch_size=8)
    opened = open_request(request, True, "The benchmark", streamed=False)
    whole = opened.model
    units = find_units(whole, ["channels", "heads"])
    gone = BlockOrder(opened, by).first(max(1, round(remove * len(blocks_of(whole)))))
    with dropping(whole, gone) as dropped:
        plain = perplexity(whole, tokens[1][:16])
        removal, counts = Removal("obs", STRUCTURED.configure("obs", {})), {u.name: u.count for u in units}
        remove_parts_(whole, units, counts, removal, opened.batches, dropped=dropped)
        return gone, plain, perplexity(whole, tokens[1][:16])


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--golden", type=Path)
    parser.add_argument("--remove", type=float, default=0.25)
    parser.add_argument("--units", action="append")
    options = parser.parse_args()
    golden = options.golden or Path("../shared/golden") / options.model.name
    for kinds in options.units or ["channels,heads", "channels"]:
        for name, case in CASES.items():
            ppl, seconds, stays = score(options.model, kinds.split(","), options.remove, case, golden)
            print(f"{stays:40} {name:30} {ppl:8.3f} {seconds:6.1f} s", flush=True)
        for shape in get_args(Shape):
            score_allocations(options.model, kinds.split(","), options.remove, shape, golden)
    for by in get_args(BlockChoice):
        gone, plain, fitted = score_blocks(options.model, options.remove, by, golden)
        print(f"without blocks {gone} by {by}: {plain:.3f}, refitted {fitted:.3f}", flush=True)


if __name__ == "__main__":
    main()
