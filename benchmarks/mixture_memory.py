"""Half of the experts of a mixture that is larger than memory, removed under a hard limit of 8 GiB of address space.

    python benchmarks/mixture_memory.py                              48 blocks of 128 experts, 512 x 192: 3.8 GB
    python benchmarks/mixture_memory.py --width 1536 --inner 512     the same of 30 GB
    python benchmarks/mixture_memory.py --blocks 8 --blocks 16       peaks of two depths

The shape is that of Qwen3-30B-A3B, narrower: 128 experts, of which a token goes to 8. Weights are random; see memory.py
for what is printed.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import memory
import numpy as np
from transformers import Qwen3MoeConfig

EXPERTS, TOP, HEADS, GROUPS, SIZE = 128, 8, 8, 2, 64
memory.LIMIT = 8 * 2**30


def tensors(width: int, inner: int, blocks: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of the weights, a list for each file: one for each block, and one for the others."""
    for block in range(blocks):
        name = f"model.layers.{block}"
        rows = HEADS * SIZE, GROUPS * SIZE
        file = [(f"{name}.self_attn.{key}_proj.weight", (rows[key != "q"], width)) for key in "qkv"]
        file += [(f"{name}.self_attn.o_proj.weight", (width, rows[0])), (f"{name}.mlp.gate.weight", (EXPERTS, width))]
        file += [(f"{name}.self_attn.{key}_norm.weight", (SIZE,)) for key in "qk"]
        file += [(f"{name}.{key}_layernorm.weight", (width,)) for key in ("input", "post_attention")]
        for expert in range(EXPERTS):
            for key, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                file.append((f"{name}.mlp.experts.{expert}.{key}_proj.weight", shape))
        yield file
    outside = ("model.embed_tokens.weight", "lm_head.weight")
    yield [*((name, (memory.VOCABULARY, width)) for name in outside), ("model.norm.weight", (width,))]


def make(folder: Path, width: int, inner: int, blocks: int) -> Path:
    """Write a model directory, one file for each block, and the tokens for calibration beside it."""
    folder.mkdir(parents=True)
    config = Qwen3MoeConfig(
        vocab_size=memory.VOCABULARY, hidden_size=width, moe_intermediate_size=inner, num_hidden_layers=blocks,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=SIZE, num_experts=EXPERTS,
        num_experts_per_tok=TOP, norm_topk_prob=True, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(memory.TOKENIZER / file, folder / file)
    pool = (np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * 0.05).view(np.uint32)
    pool = (pool >> 16).astype(np.uint16)  # bfloat16 is the upper half of float32
    where, random = {}, np.random.default_rng(1)
    for number, listed in enumerate(tensors(width, inner, blocks), start=1):
        file = f"model-{number:05}-of-{blocks + 1:05}.safetensors"
        where |= {name: file for name, _ in listed}
        memory.write_shard(folder / file, listed, pool, random)
    total = sum(2 * math.prod(shape) for listed in tensors(width, inner, blocks) for _, shape in listed)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    memory.write_tokens(folder.parent / "tokens.safetensors")
    return folder


def main() -> None:
    """Make each model, slim it, and print a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, action="append")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=192)
    parser.add_argument("--experts", default="obs")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    for blocks in options.blocks or [48]:
        with tempfile.TemporaryDirectory() as name:
            model = make(Path(name) / "model", options.width, options.inner, blocks)
            size = sum(file.stat().st_size for file in model.iterdir()) / 1e9
            text = ["--calibration", Path(name) / "tokens.safetensors", "--samples", memory.TOKENS[0]]
            text += ["--length", memory.TOKENS[1]]
            how = ["--remove", "0.49", "--units", "experts", "--experts", options.experts, *text]
            found = memory.limited("slim", model, *how, "-o", Path(name) / "small", echo="takes about")
            print(
                f"{blocks} blocks, {size:.1f} GB: {found['seconds']:.0f} s, peak {found['peak'] / 1e9:.2f} GB, space "
                f"{found['space'] / 1e9:.2f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
