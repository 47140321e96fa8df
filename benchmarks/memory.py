"""Prune, quantize, compress and measure a model of 7B shape under a hard limit of 6 GiB of address space, and compare
two depths.

    python benchmarks/memory.py               32 blocks of 4096 x 11008 in bfloat16: 13 GB, written by this program
    python benchmarks/memory.py --blocks 4    the same width, shallower: seconds to minutes
    python benchmarks/memory.py --blocks 2 --only compress --layers 're:.*layers.1.mlp.down_proj'
    python benchmarks/memory.py --depth       peaks of 8 and 16 blocks of 1024 x 2816

Each command runs in its own process with `RLIMIT_AS` set, as `ulimit -v` does. This limits all address space, libraries
and thread stacks included, so it is stricter than a limit on resident memory, and it needs no privileges. `peak` is the
largest resident set (VmHWM), `space` the largest address space (VmPeak). `bound`, for commands without Gram matrices,
is embeddings + head + 3 blocks + hidden states + 500 MB. The weights are slices of one random tensor; the memory does
not depend on their values. A full spectrum of every layer takes hours on two cores, so `alpha` is measured on one layer
of the first and of the last block, and `outliers`, a metric of activations, on all layers.
"""

import argparse
import contextlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

LIMIT, VOCABULARY, TOKENS = 6 * 2**30, 32000, (4, 64)
SHARD = 2 * 10**9
TOKENIZER = Path(__file__).resolve().parents[1] / "billhook" / "demo_model"
WHAT = """
import re, sys
from billhook.cli import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("|".join(re.search(name + r":\\s+(\\d+)", status)[1] for name in ("VmHWM", "VmPeak")), file=sys.stderr)
"""


def tensors(width: int, inner: int, blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a llama's weights."""
    yield "model.embed_tokens.weight", (VOCABULARY, width)
    for block in range(blocks):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{block}.self_attn.{name}.weight", (width, width)
        for name, shape in (("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))):
            yield f"model.layers.{block}.mlp.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{block}.{name}.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (VOCABULARY, width)


def make(folder: Path, width: int, inner: int, blocks: int) -> Path:
    """Write a model directory, shard by shard, with one tensor in memory; and the token file for calibration."""
    folder.mkdir(parents=True)
    rows = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": width // 128,
    }
    config = LlamaConfig(vocab_size=VOCABULARY, dtype="bfloat16", architectures=["LlamaForCausalLM"], **rows)
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, folder / file)
    pool = (np.random.default_rng(0).standard_normal(1 << 26, dtype=np.float32) * 0.02).view(np.uint32)
    pool = (pool >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in tensors(width, inner, blocks):
        if sum(2 * math.prod(s) for _, s in shards[-1]) + 2 * math.prod(shape) > SHARD:
            shards.append([])
        shards[-1].append((name, shape))
    where, random = {}, np.random.default_rng(1)
    for number, listed in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        where |= {name: file for name, _ in listed}
        write_shard(folder / file, listed, pool, random)
    total = sum(2 * math.prod(shape) for _, shape in tensors(width, inner, blocks))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": where})
    )
    write_tokens(folder.parent / "tokens.safetensors")
    return folder


def write_tokens(path: Path) -> None:
    """A token file for calibration."""
    ids = np.random.default_rng(2).integers(0, VOCABULARY, TOKENS).astype(np.int64)
    header = json.dumps({"tokens": {"dtype": "I64", "shape": list(TOKENS), "data_offsets": [0, ids.nbytes]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + ids.tobytes())


def write_shard(
    path: Path, listed: list[tuple[str, tuple[int, ...]]], pool: np.ndarray, random: np.random.Generator
) -> None:
    """One safetensors file; weights are slices of `pool`, norms are ones."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in listed:
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in listed:
            left = math.prod(shape)
            if len(shape) == 1:
                file.write(np.full(left, 0x3F80, np.uint16).tobytes())
                continue
            while left:
                start = int(random.integers(0, len(pool) // 2))
                piece = pool[start : start + min(left, len(pool) // 2)]
                file.write(piece.data)
                left -= len(piece)


def limited(*arguments: Any, echo: str = "") -> dict[str, float]:
    """Run `billhook ARGUMENTS` under the limit; returns seconds, peak and address space.

    Lines that it says with `echo` in them are printed.
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))

    start = time.perf_counter()
    command = [sys.executable, "-c", WHAT, *map(str, arguments)]
    ran = subprocess.run(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit)
    *said, last = ran.stderr.strip().splitlines()
    for line in said if echo else ():
        if echo in line:
            print(f"  {line}")
    if ran.returncode:
        sys.exit(f"{' '.join(map(str, arguments))} failed: {said or last}")
    peak, space = (int(x) * 1024 for x in last.split("|"))
    return {"seconds": time.perf_counter() - start, "peak": peak, "space": space}


def bound(width: int, inner: int) -> int:
    """Bytes that a run may use at most."""
    block = 2 * (4 * width * width + 3 * width * inner + 2 * width)
    return 2 * 2 * VOCABULARY * width + 3 * block + 2 * math.prod(TOKENS) * width + 500 * 10**6


def runs(folder: Path, model: Path, blocks: int, layers: str) -> Iterator[tuple[str, list[Any]]]:
    """The commands, by name; each pruned model is removed once it is verified."""
    text = ["--calibration", folder / "tokens.safetensors", "--samples", TOKENS[0], "--length", TOKENS[1]]
    ends = ["--targets", "model.layers.0.self_attn.q_proj", "--targets", f"model.layers.{blocks - 1}.self_attn.q_proj"]
    yield "measure alpha of two layers", ["measure", model, *ends, "-o", folder / "alpha.json"]
    yield (
        "measure outliers of all",
        ["measure", model, "--metrics", "outlier_ratio:5", *text, "-o", folder / "table.json"],
    )
    for criterion, more in (("magnitude", []), ("wanda", text)):
        output = folder / criterion
        yield (
            f"prune {criterion}",
            ["prune", model, "--sparsity", "0.5", "--criterion", criterion, *more, "-o", output, "--resume"],
        )
        yield f"verify {criterion}", ["verify", output]
        yield f"remove {criterion}", []
    for name, more in (
        ("quantize", ["--type", "q4_k"]),
        ("compress", ["--bits", "4", "--types", "q2_k,q3_k,iq4_xs,q5_k"]),
    ):
        chosen = ["--targets", layers] if layers else []
        yield name, [name, model, *more, *text, *chosen, "-o", folder / name, "--resume"]
        yield f"verify {name}", ["verify", folder / name]
        yield f"remove {name}", []
    scored = ["--data", folder / "tokens.safetensors", "--length", TOKENS[1]]
    yield "eval", ["eval", model, *scored]


def main() -> None:
    """Make the model, run the commands, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=11008)
    parser.add_argument("--depth", action="store_true", help="compare the peaks of two depths instead")
    parser.add_argument(
        "--folder", type=Path, help="where the model is made (a temporary folder inside it); by default TMPDIR"
    )
    parser.add_argument(
        "--keep", type=Path, help="make the model here, or take it from here, and leave it; with --only, a run in parts"
    )
    parser.add_argument("--only", default="", help="run the commands that begin so")
    parser.add_argument("--layers", default="", help="quantize and compress only these (a pattern of --targets)")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    models = [(1024, 2816, 8), (1024, 2816, 16)] if options.depth else [(options.width, options.inner, options.blocks)]
    for width, inner, blocks in models:
        with contextlib.ExitStack() as stack:
            name = options.keep or stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder))
            model = Path(name) / "model"
            model = model if model.exists() else make(model, width, inner, blocks)
            size = sum(file.stat().st_size for file in model.iterdir()) / 1e9
            print(
                f"{blocks} blocks of {width} x {inner}: {size:.1f} GB; bound {bound(width, inner) / 1e9:.2f} GB, "
                f"limit {LIMIT / 1e9:.2f} GB"
            )
            for what, arguments in runs(Path(name), model, blocks, options.layers):
                if not what.startswith(options.only):
                    continue
                if not arguments:
                    shutil.rmtree(Path(name) / what.split()[1], ignore_errors=True)
                    continue
                found = limited(*arguments)
                bounded = not what.startswith(("quantize", "compress"))
                fits = "  ABOVE THE BOUND" if bounded and found["peak"] > bound(width, inner) else ""
                figures = (
                    f"{found['seconds']:7.1f} s  peak {found['peak'] / 1e9:5.2f} GB  space "
                    f"{found['space'] / 1e9:5.2f} GB"
                )
                print(f"  {what:28} {figures}{fits}", flush=True)


if __name__ == "__main__":
    main()
