"""Time packed weights on a CUDA device against cuBLAS in bfloat16: single products, and a whole LLaMA-7B.

    python benchmarks/gpu_kernels.py            products at LLaMA-7B's shapes, 50 to 80 %, 1, 4 and 16 tokens
    python benchmarks/gpu_kernels.py --decode   a random LLaMA-7B: tokens per second, and its products alone

`python benchmarks/kernels.py --device cuda` is the same as the first. Without a GPU, or without Triton, a message says
so.

Every figure is a ratio within one run. A variant runs over as many copies of its weight as fill --mib, captured in one
CUDA graph, so that neither launches nor the second-level cache affect the time; variants take turns, medians of
rounds. `bound` is the limit of memory traffic: 16 bits per dense weight, against 16 per kept one, 1 of bitmask and 1/8
of table. `copy` is the bandwidth of a copy within the device, both directions counted, and `of copy` is the fraction
of it that the packed product reaches with the bytes it reads.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from quiet_timing import median, spread
from torch import Tensor, nn
from torch.nn.functional import linear

from billhook.runtime import gpu, native
from billhook.runtime.gpu_ops import Weight, chunk_table, way_for
from billhook.runtime.linear import SparseLinear

TARGETS = {50: 1.4, 70: 2.0, 80: 2.6}
LLAMA_7B = "4096x4096,11008x4096,4096x11008"
Run = Callable[[int], object]


def weight_of(dense: Tensor) -> Weight:
    """The packed form on the device of `dense`."""
    bitmask, values = native.pack(dense.cpu())
    table = chunk_table(bitmask, native.row_starts(bitmask, dense.shape[1]))
    return Weight(bitmask.to(dense.device), values.to(dense.device), table.to(dense.device), None, 0)


def clone(weight: Weight) -> Weight:
    """Another copy in memory."""
    return Weight(weight.bitmask.clone(), weight.values.clone(), weight.table.clone(), None, 0)


def captured(run: Run, copies: int) -> Callable[[], float]:
    """`run` over all copies in one CUDA graph; calling it gives seconds a run."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(copies):
            run(number)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / copies

    return timed


def take_turns(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, after one warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, timed in variants.items():
            seconds = timed()
            if turn:
                times[name].append(seconds)
    return times


def copy_bandwidth(mib: int = 2048) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(mib << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / min(take_turns({"copy": captured(lambda _: target.copy_(source), 1)}, 10)["copy"])


def one(shape: tuple[int, int], percent: int, tokens: int, mib: int, rounds: int) -> dict[str, Any]:
    """One shape, sparsity and number of tokens: the chosen way, its speed against cuBLAS and its error against
    float64."""
    base = torch.randn(shape, device="cuda").bfloat16() / shape[1] ** 0.5
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    pruned = torch.where(torch.rand(shape, device="cuda") < percent / 100, 0, base)
    packed = weight_of(pruned)
    ways = " ".join(gpu.choose(packed, shape[1], x.dtype).split()[:3])
    size = sum(tensor.nbytes for tensor in (packed.bitmask, packed.values, packed.table))
    ours = [clone(packed) for _ in range((mib << 20) // size + 1)]
    plain = [base.clone() for _ in range((mib << 20) // base.nbytes + 1)]

    def product(number: int) -> Tensor:
        weight = ours[number % len(ours)]
        return torch.ops.billhook.gpu_linear(
            x, weight.bitmask, weight.values, weight.table, None, None, group=0, ways=ways
        )

    expected = x.double() @ pruned.double().T
    error = float((product(0).double() - expected).norm() / expected.norm())
    variants = {"dense": captured(lambda i: linear(x, plain[i]), len(plain)), "packed": captured(product, len(ours))}
    times = take_turns(variants, rounds)
    dense, seconds = median(times["dense"]), median(times["packed"])
    return {
        "shape": list(shape),
        "sparsity": percent,
        "tokens": tokens,
        "way": way_for(ways, tokens),
        "speed": dense / seconds,
        "bound": base.nbytes / size,
        "packed us": 1e6 * seconds,
        "dense us": 1e6 * dense,
        "packed GB/s": size / seconds / 1e9,
        "error": error,
        "spread": max(spread(times["dense"]), spread(times["packed"])),
    }


def products(shapes: str, sparsity: str, tokens: str, mib: int, rounds: int) -> dict[str, Any]:
    """All combinations, each printed when it is measured."""
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {copy / 1e9:.0f} GB/s", flush=True)
    results = []
    for shape in shapes.split(","):
        rows, columns = map(int, shape.split("x"))
        for count in tokens.split(","):
            for percent in sparsity.split(","):
                result = one((rows, columns), int(percent), int(count), mib, rounds)
                results.append(result)
                print(
                    f"{shape:>11} {percent} % {count:>2} tokens  {result['way']:<12} {result['speed']:.2f}x of "
                    f"{result['bound']:.2f}x  "
                    f"{result['packed us']:.1f} us (dense {result['dense us']:.1f})  of copy "
                    f"{result['packed GB/s'] * 1e9 / copy:.0%}  "
                    f"error {result['error']:.1e}  spread {result['spread']:.0%}",
                    flush=True,
                )
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy GB/s": copy / 1e9,
        "results": results,
    }


def llama(blocks: int) -> nn.Module:
    """A random LLaMA-7B with this number of blocks, bfloat16, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32, vocab_size=32000
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def pack_(model: nn.Module, percent: int) -> None:
    """Replace the linear layers of the blocks by packed ones with random masks."""
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                keep = torch.rand_like(child.weight, dtype=torch.float32) >= percent / 100
                layer = SparseLinear.from_dense(torch.where(keep, child.weight.detach(), 0).cpu()).to("cuda")
                gpu.prepare(layer, torch.bfloat16)
                setattr(parent, name, layer)


def speeds(model: Any, new: int, rounds: int) -> dict[str, float]:
    """Tokens per second of `generate` and of all linear layers alone (one CUDA graph), and GiB of memory."""
    prompt = torch.randint(0, 32000, (1, 64), device="cuda")
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | SparseLinear)]
    inputs = {
        width: torch.randn(1, width, device="cuda").bfloat16() for width in {layer.in_features for layer in layers}
    }
    alone = captured(lambda _: [layer(inputs[layer.in_features]) for layer in layers], 1)

    def generate() -> float:
        torch.cuda.synchronize()
        before = time.perf_counter()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - before

    times = take_turns({"generate": generate, "layers": alone}, rounds)
    return {
        "tokens/s": new / median(times["generate"]),
        "layers tokens/s": 1 / median(times["layers"]),
        "GiB": torch.cuda.memory_allocated() / 2**30,
    }


def decode(blocks: int, sparsity: str, new: int, rounds: int) -> dict[str, Any]:
    """A dense model, then the same model packed at each sparsity, one after another."""
    results: dict[str, Any] = {}
    for percent in ("0", *sparsity.split(",")):
        model = llama(blocks)
        if percent != "0":
            pack_(model, int(percent))
        torch.cuda.empty_cache()
        found = speeds(model, new, rounds)
        del model
        results[percent] = found | {
            f"{name} ratio": found[name] / results.get("0", found)[name] for name in ("tokens/s", "layers tokens/s")
        }
        print(
            f"{percent} %  " + "  ".join(f"{name} {value:.2f}" for name, value in results[percent].items()), flush=True
        )
    return {"device": torch.cuda.get_device_name(), "blocks": blocks, "new": new, "results": results}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=LLAMA_7B)
    parser.add_argument("--sparsity", default="50,60,70,80")
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--mib", type=int, default=1024, help="copies of each weight fill this much")
    parser.add_argument("--decode", action="store_true", help="a whole model instead")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="the results as json at the end")
    args = parser.parse_args(arguments)
    if line := gpu.missing("cuda"):
        print(f"Nothing was measured. {line}")
        return
    with torch.inference_mode():
        if args.decode:
            found = decode(args.blocks, args.sparsity, args.new, min(args.rounds, 5))
        else:
            found = products(args.shapes, args.sparsity, args.tokens, args.mib, args.rounds)
    if args.json:
        print(json.dumps(found | {"targets": TARGETS}, indent=1))


if __name__ == "__main__":
    main()
