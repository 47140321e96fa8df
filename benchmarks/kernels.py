"""Time products with a packed weight against the alternatives: torch dense (bf16, fp32, prepacked, int8), torch CSR,
and our dense kernel.

    python benchmarks/kernels.py                         matrix-vector products, 4096 x 4096 and 11008 x 4096
    python benchmarks/kernels.py --tokens 16,128,512     prefill
    python benchmarks/kernels.py --dtype float32 ...     weights, activations and the torch baseline in another dtype
    python benchmarks/kernels.py --paths                 every instruction set that this machine supports
    python benchmarks/kernels.py --device cuda           on a GPU: gpu_kernels.py

Every figure is a ratio within one run: variants take turns, each on another copy of its weight, so that more than
--mib of memory lies between two uses; medians of quiet rounds (see quiet_timing.py). `dense` is
`torch.nn.functional.linear` in --dtype. `read` is the speed at which the packed bytes can be read at all, and
`bandwidth` = packed kernel / read.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import gpu_kernels
import torch
from quiet_timing import median, rounds, spread
from torch import Tensor
from torch.nn.functional import linear

from billhook.runtime import autotune, library, native
from billhook.runtime.native import Weight

Run = Callable[[int], object]


def copies(make: Callable[[], Any], size: int, mib: int) -> list[Any]:
    """Enough copies to exceed the caches."""
    return [make() for _ in range(max(2, (mib << 20) // size + 1))]


def packed(weight: Tensor, int8: bool = False) -> Weight:
    """A copy of `weight` as the kernels read it, with `int8` in int8 with one scale per row."""
    scales = weight.abs().amax(1).float().clamp(min=1e-8) / 127 if int8 else None
    values = (weight.float() / scales[:, None]).round().to(torch.int8) if scales is not None else weight
    bitmask, packed_values = native.pack(values)
    return Weight(*weight.shape, packed_values, bitmask, native.row_starts(bitmask, weight.shape[1]), scales)


def dense_variants(base: Tensor, x: Tensor, mib: int, everything: bool) -> dict[str, Run]:
    """The alternatives for a dense weight."""
    out, columns = base.shape
    plain = copies(base.clone, base.numel() * base.element_size(), mib)
    found: dict[str, Run] = {"dense": lambda i: linear(x, plain[i % len(plain)])}
    if base.dtype == torch.bfloat16:
        ours = [Weight(out, columns, weight) for weight in plain]
        found["our dense"] = lambda i: ours[i % len(ours)].multiply(x, None)
    if everything:
        wide, x32 = copies(base.float, base.numel() * 4, mib), x.float()
        found["dense fp32"] = lambda i: linear(x32, wide[i % len(wide)])
        pack = torch.ops.mkldnn._reorder_linear_weight
        prepacked = copies(lambda: pack(base, x.shape[0]), base.numel() * 2, mib)
        found["dense prepacked"] = lambda i: torch.ops.mkldnn._linear_pointwise(
            x, prepacked[i % len(prepacked)], None, "none", [], ""
        )
        scale = base.abs().amax(1) / 127
        small = copies(lambda: (base / scale[:, None]).round().to(torch.int8), base.numel(), mib)
        found["dense int8"] = lambda i: torch.ops.aten._weight_int8pack_mm(x, small[i % len(small)], scale)
    return found


def sparse_variants(weight: Tensor, x: Tensor, args: argparse.Namespace) -> dict[str, Run]:
    """The packed weight by our kernels, by other instruction sets, in int8, and torch's CSR."""
    nnz = int((weight != 0).sum())
    mask_bytes, value_bytes = weight.numel() // 8, weight.element_size() * nnz
    ours = copies(lambda: packed(weight), value_bytes + mask_bytes, args.mib)
    found: dict[str, Run] = {"packed": lambda i: autotune.product(ours[i % len(ours)], x, None)}
    kernels, threads = library.active()[0], torch.get_num_threads()  # type: ignore[index]
    buffers = copies(
        lambda: torch.ones(value_bytes + mask_bytes, dtype=torch.uint8), value_bytes + mask_bytes, args.mib
    )
    found["read"] = lambda i: kernels.billhook_read(buffers[i % len(buffers)].data_ptr(), buffers[0].numel(), threads)
    if weight.dtype == torch.bfloat16:
        small = copies(lambda: packed(weight, int8=True), nnz + mask_bytes, args.mib)
        found["packed int8"] = lambda i: autotune.product(small[i % len(small)], x, None)
    if not args.short:
        csr, x32 = copies(lambda: weight.float().to_sparse_csr(), 12 * nnz, args.mib), x.float().T.contiguous()
        found["torch CSR fp32"] = lambda i: csr[i % len(csr)] @ x32
    if args.paths:
        for name in library.paths()[1:-1]:

            def run(i: int, name: str = name) -> None:
                with library.forced(name):
                    ours[i % len(ours)].multiply(x, None)

            found[name] = run
    return found


def one(shape: tuple[int, int], percent: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """All variants for one shape, sparsity and token count: speeds relative to torch's dense product, and bandwidth."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)
    base = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    keep = torch.rand(shape, generator=generator) >= percent / 100
    pruned = base.masked_fill(~keep, 0)  # not base * keep: that makes zeros of either sign, and -0.0 is kept as a value
    variants = dense_variants(base, x, args.mib, not args.short and dtype == torch.bfloat16) | sparse_variants(
        pruned, x, args
    )
    for int8 in (False, True)[: 1 + (dtype == torch.bfloat16)]:
        autotune.measure_packed(packed(pruned, int8), dtype)
    for run in variants.values():
        run(0)
    times, discarded = rounds(variants, args.rounds, args.seconds)
    middle = {name: median(values) for name, values in times.items()}
    bytes_read = pruned.element_size() * int((pruned != 0).sum()) + keep.numel() / 8
    return {
        "shape": list(shape),
        "sparsity": percent,
        "tokens": tokens,
        "way": autotune.way(packed(pruned), dtype, tokens),
        "speed": {name: middle["dense"] / seconds for name, seconds in middle.items()},
        "against our dense": middle["our dense"] / middle["packed"] if "our dense" in middle else None,
        "bandwidth": middle["read"] / middle["packed"],
        "read GB/s": bytes_read / middle["read"] / 1e9,
        "dense ms": 1e3 * middle["dense"],
        "spread": max(spread(times["dense"]), spread(times["packed"])),
        "rounds": len(times["dense"]),
        "discarded": discarded,
    }


def show(result: dict[str, Any]) -> None:
    """Print one result as lines of a table."""
    rows, columns = result["shape"]
    print(
        f"\n{rows} x {columns}, {result['sparsity']} %, {result['tokens']} tokens ({result['way']}); dense "
        f"{result['dense ms']:.2f} ms"
    )
    print("  " + "  ".join(f"{name} {speed:.2f}" for name, speed in result["speed"].items()))
    ours = f"against our dense {result['against our dense']:.2f}, " if result["against our dense"] else ""
    line = f"  {ours}{result['bandwidth']:.0%} of {result['read GB/s']:.1f} GB/s"
    print(
        f"{line}; spread {result['spread']:.0%}, {result['rounds']} quiet rounds, {result['discarded']} discarded",
        flush=True,
    )


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: run gpu_kernels.py with its defaults"
    )
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--sparsity", default="50,60,70,80")
    parser.add_argument("--tokens", default="1")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30, help="time limit of one line")
    parser.add_argument("--mib", type=int, default=1024, help="copies of each weight fill this much")
    parser.add_argument("--paths", action="store_true", help="all instruction sets that this machine supports")
    parser.add_argument("--short", action="store_true", help="only the variants of the targets")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda":
        gpu_kernels.main(["--json"] if args.json else [])
        return
    torch.set_num_threads(args.threads)
    results = []
    with torch.inference_mode():
        for shape in args.shapes.split(","):
            for tokens in args.tokens.split(","):
                for percent in args.sparsity.split(","):
                    rows, columns = map(int, shape.split("x"))
                    results.append(one((rows, columns), int(percent), int(tokens), args))
                    if not args.json:
                        show(results[-1])
    if args.json:
        print(json.dumps({"about": library.about(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
