"""What quantization loses: excess log-perplexity, KL divergence and top-1 agreement by type, method and allocation.

    python benchmarks/bits.py [--folder ../shared] [--model babyllama-105] [--rows bits.jsonl] [--only int3]

Calibrated on `golden/*/calibration`, scored on `golden/*/evaluation` only, quantized block by block in float32.
Layers whose columns do not divide by 64 have groups of 32. `50 % zeros` is `admm`, uniform, stored in 16 bits
with a bitmask (9 bits a weight): the pruned model that the same size of file could hold. `llama.cpp` rows are its own
quantizer (the package libgguf) with the diagonal of the Gram matrix as importance matrix, which has no error feedback.
Allocators of types choose from 2 to 6 bits for each layer, with what half of the calibration windows say; `auto`
scores on the other half. Times are processor time. Rows are kept in a file as they come, and a run goes on where it
stopped. A Markdown table ends the output.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from billhook import load_model, prune
from billhook.architectures.layers import find_layers
from billhook.engine.loop import apply_plan_
from billhook.engine.method import Quantization
from billhook.engine.resources import IN_MEMORY
from billhook.engine.walk import walk
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.scoring import NEXT_TOKEN
from billhook.measurement.fisher import fisher
from billhook.measurement.level_errors import level_errors
from billhook.measurement.measure import measure
from billhook.methods.encoded import Encoded
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.gptq import gptq
from billhook.methods.quantize.grids import grid_of
from billhook.methods.statistics import LayerStats
from billhook.plan.level_allocators import ERRORS, LEVEL_ALLOCATORS, WEIGHTS, allocate_levels
from billhook.plan.levels import Levels
from billhook.plan.plan import Plan
from billhook.plan.spec import Spec
from billhook.racing.levels import choose_types, needs
from billhook.recovery.block_scales import ScaleTuner
from billhook.steps.types import uniform_plan
from billhook.tasks.base import Samples
from billhook.trials.heldout import Split, split_samples

MODELS = ("babyllama-105", "c4gut-llama-12x128")
TYPES = ("int4/64", "int3/64", "int2/64", "q4_0", "iq4_nl", "q5_0")
FORMS = {  # of a type: quantizer and options
    "round": ("round", {}),
    "GPTQ": ("gptq", {"dense_target": 0.0, "sweeps": 0}),
    "GPTQ, dense target": ("gptq", {"sweeps": 0}),
    "GPTQ, sweeps": ("gptq", {"dense_target": 0.0}),
    "GPTQ, dense target, one sweep": ("gptq", {"sweeps": 1}),
    "GPTQ, dense target, sweeps": ("gptq", {}),
}
STEPS = {"feedback from 64 columns to the next": 64, "feedback from 8 columns to the next": 8}  # GPTQ, no sweeps
BITS = (3.25, 2.5)  # of allocations
ROWS = 8  # windows in a batch


class Bench:
    """One model with its golden text."""

    def __init__(self, folder: Path, name: str) -> None:
        golden = folder / "golden" / name
        self.path = folder / "models" / name
        self.calibration = load_file(golden / "calibration.safetensors")["tokens"].long()
        self.evaluation = load_file(golden / "evaluation.safetensors")["tokens"].long()
        self.dense = load_model(self.path, dtype="float32")
        self.batches = [{"input_ids": part} for part in self.calibration.split(ROWS)]

    def quantized(self, plan: Plan, method: Quantization, tuned: bool = False) -> tuple[PreTrainedModel, float]:
        """The model quantized by a plan, with the scales and norms of its blocks `tuned`, and its bits a weight."""
        model = load_model(self.path, dtype="float32")
        layers = find_layers(model)
        known: dict[str, Any] = {"layers": layers}
        if tuned:
            tuner = ScaleTuner(model, self.batches, IN_MEMORY, 0, lambda layer, weight: None)
            known |= {"tuner": tuner, "made": tuner.made}
        apply_plan_(model, plan, method, self.batches, **known)
        shapes = {layer.name: layer.shape for layer in layers}
        return model, 8 * plan.bytes(shapes) / sum(out * columns for out, columns in shapes.values())

    def uniform(self, type: str, form: str) -> tuple[PreTrainedModel, float]:
        """One type everywhere."""
        quantizer, options = FORMS[form]
        plan, _ = uniform_plan(type, find_layers(self.dense))
        return self.quantized(plan, Quantization(quantizer, QUANTIZERS.configure(quantizer, options)))

    def tuned(self, type: str) -> tuple[PreTrainedModel, float]:
        """One type everywhere, as `--recipe best` makes it."""
        plan, _ = uniform_plan(type, find_layers(self.dense))
        return self.quantized(plan, Quantization("gptq", QUANTIZERS.configure("gptq", {})), tuned=True)

    def coarse(self, type: str, step: int) -> tuple[PreTrainedModel, float]:
        """One type everywhere, by GPTQ whose errors go from vector to vector of `step` columns."""
        plan, _ = uniform_plan(type, find_layers(self.dense))
        return self.quantized(plan, Coarse("gptq", {"dense_target": 0.0, "sweeps": 0}, step=step))

    def dense_statistics(self, type: str) -> tuple[PreTrainedModel, float]:
        """One type everywhere, all inputs being those of the dense model, so that there is no dense target either."""
        model = load_model(self.path, dtype="float32")
        plan, _ = uniform_plan(type, find_layers(model))
        made = [
            (layer, gptq(layer.weight.float(), block.stats[layer.name], grid_of(plan.weights[layer.name].type or "")))
            for block in walk(model, self.batches, ("gram",), read_only=True)
            for layer in block.layers
        ]
        for layer, quantized in made:
            layer.weight.copy_(quantized.decode(torch.float32))
        shapes = {layer.name: layer.shape for layer in find_layers(model)}
        return model, 8 * plan.bytes(shapes) / sum(out * columns for out, columns in shapes.values())

    @cached_property
    def levels(self) -> tuple[Levels, Split]:
        """What allocators read for scalar types of the layers, measured on half of the text, and that half."""
        layers = find_layers(self.dense)
        shapes = {layer.name: layer.shape for layer in layers}
        menus = {n: [f"int{b}/{64 if s[1] % 64 == 0 else 32}" for b in range(2, 7)] for n, s in shapes.items()}
        samples = Samples({"input_ids": self.calibration}, "golden", "golden", "given")
        split = split_samples(self.dense, samples, ROWS, 0)
        found = level_errors(self.dense, layers, split.batches, menus)
        information = fisher(self.dense, layers, split.batches, NEXT_TOKEN)
        costs = {name: 0.5 * f * found.power[name] for name, f in information.items()}
        columns = [c for name in LEVEL_ALLOCATORS.names() for c in needs(name) if c not in (ERRORS, WEIGHTS)]
        table = measure(self.dense, list(dict.fromkeys(columns)), batches=split.batches, layers=layers)
        return Levels(shapes, menus, 1, errors=found.errors, weights=costs, table=table), split

    def allocated(self, bits: float, allocator: str) -> tuple[PreTrainedModel, float]:
        """Scalar types for the layers, in as many bytes as a mean of `bits` with groups of 64."""
        levels, split = self.levels
        method = Quantization("gptq", QUANTIZERS.configure("gptq", {}))
        same = uniform_plan("int3/64", find_layers(self.dense))[0].bytes(levels.shapes)
        levels = replace(levels, budget=int(same * bits / 3.25))
        if allocator in LEVEL_ALLOCATORS.names():
            return self.quantized(allocate_levels(levels, allocator), method)
        model, quick = load_model(self.path, dtype="float32"), replace(method, options={**method.options, "sweeps": 0})
        options: dict[str, Any] = {"allocator": allocator, "options": {"steps": 100} if allocator == "rco" else {}}
        return self.quantized(choose_types(model, find_layers(model), split, levels, quick, **options).plan, method)

    @torch.no_grad()
    def llamacpp(self, type: str) -> tuple[PreTrainedModel, float]:
        """llama.cpp's own quantizer, with the dense model's statistics."""
        import libgguf

        model, kind = load_model(self.path, dtype="float32"), getattr(libgguf.GGMLQuantizationType, type.upper())
        plan, _ = uniform_plan(type, find_layers(model))
        norms = [
            (layer, block.stats[layer.name].input_norm)
            for block in walk(model, self.batches, ("input_norm",), read_only=True)
            for layer in block.layers
        ]
        for layer, norm in norms:
            assert norm is not None
            layer.weight.copy_(_through_libgguf(layer.weight, norm.square(), kind))
        shapes = {layer.name: layer.shape for layer in find_layers(model)}
        return model, 8 * plan.bytes(shapes) / sum(out * columns for out, columns in shapes.values())

    def zeros(self) -> tuple[PreTrainedModel, float]:
        """Half of the weights removed by `admm`."""
        model = load_model(self.path, dtype="float32")
        prune(model, sparsity=0.5, criterion="admm", allocator="uniform", calibration=self.calibration)
        return model, 9.0


class InSteps:
    """A grid whose codes are chosen for `step` columns, or a group if that is narrower, before errors are passed on."""

    def __init__(self, grid: Any, step: int) -> None:
        self.grid, self.step = grid, min(step, grid.group)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.grid, name)


@dataclass(frozen=True)
class Coarse(Quantization):
    """GPTQ with a coarse step of the feedback."""

    step: int = 1

    def encode(self, weight: Tensor, stats: LayerStats, spec: Spec, zeros: int) -> Encoded:
        """The quantized weight, decoded by the grid proper."""
        grid: Any = grid_of(spec.type or "", self.scale_dtype)
        return replace(gptq(weight.float(), stats, InSteps(grid, self.step), **self.options), grid=grid)  # type: ignore[arg-type]


def _through_libgguf(weight: Tensor, importance: Tensor, kind: Any) -> Tensor:
    import libgguf

    codes = libgguf.quantize_rows(weight.numpy().copy(), kind, imatrix=importance.numpy())
    return torch.tensor(libgguf.dequantize_rows(codes, kind, n_per_row=weight.shape[1]))


def cells(bench: Bench) -> Iterator[tuple[str, str, Callable[[], tuple[PreTrainedModel, float]]]]:
    """What is measured on a model: type, method, and what makes the quantized model."""
    yield "bf16", "50 % zeros", bench.zeros
    for type in TYPES:
        scalar = type.startswith("int")
        for form in FORMS if scalar else list(FORMS)[-1:]:
            yield type, form, lambda type=type, form=form: bench.uniform(type, form)  # type: ignore[misc]
        for form, step in STEPS.items() if scalar else ():
            yield type, form, lambda type=type, step=step: bench.coarse(type, step)  # type: ignore[misc]
        yield type, "GPTQ, dense target, sweeps, blocks tuned", lambda type=type: bench.tuned(type)  # type: ignore[misc]
        if scalar:
            yield type, "GPTQ, sweeps, inputs of the dense model", lambda type=type: bench.dense_statistics(type)  # type: ignore[misc]
        if not scalar and find_spec("libgguf"):
            yield type, "llama.cpp, importance matrix", lambda type=type: bench.llamacpp(type)  # type: ignore[misc]
    for bits in BITS:
        for name in (*LEVEL_ALLOCATORS.names(), "rco", "auto"):
            yield f"int2 to int6, {bits} bits", name, lambda x=(bits, name): bench.allocated(*x)  # type: ignore[misc]


def measured(bench: Bench, make: Callable[[], tuple[PreTrainedModel, float]]) -> dict[str, Any]:
    """The figures of one cell."""
    start = time.process_time()
    model, bits = make()
    seconds = time.process_time() - start
    found = evaluate(model, bench.evaluation, against=bench.dense)
    assert found.against is not None
    excess, agreed = found.nll - found.against.nll, found.against.top1_agreement
    return {"bits": bits, "excess": excess, "kl": found.against.kl, "top1": agreed, "seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| model | type | method | bits | excess | KL | same top-1 | s |", "|" + " --- |" * 8]
    for r in rows:
        numbers = f"{r['bits']:.2f} | {r['excess']:.4f} | {r['kl']:.4f} | {r['top1']:.3f} | {r['seconds']:.0f}"
        lines.append(f"| {r['model']} | {r['type']} | {r['method']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--rows", type=Path, default=Path("bits.jsonl"))
    parser.add_argument("--only", default="", help="only types that begin with this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    for name in options.model or MODELS:
        bench = Bench(options.folder, name)
        for type, method, make in cells(bench):
            if any((r["model"], r["type"], r["method"]) == (name, type, method) for r in rows):
                continue
            if not type.startswith(options.only):
                continue
            rows.append({"model": name, "type": type, "method": method, **measured(bench, make)})
            assert math.isfinite(rows[-1]["excess"])
            with options.rows.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
