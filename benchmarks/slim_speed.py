"""Decoding speed of a random Llama and of what `billhook slim` leaves of it, in stock transformers, and in llama.cpp.

    python benchmarks/slim_speed.py [--blocks 16] [--width 2048] [--inner 5632] [--llamacpp FOLDER]

A quarter of the parameters in blocks goes, as channels and heads, chosen by magnitude. Prints the time of a decoding
step (one token after 64, bfloat16, one thread, processor time, median of rounds in which both models take turns), and
the ratio of the times beside the ratio of the bytes of weights that a step reads (all but the embeddings). FOLDER holds
llama.cpp's `llama-bench`, which is run on both models as GGUF files in f16.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from billhook.steps.export import export_gguf
from billhook.steps.slim import slim

CONTEXT, ROUNDS = 64, 15


@torch.no_grad()
def step(model: PreTrainedModel) -> float:
    """Seconds of processor time for a token after `CONTEXT` others."""
    cache, ids = DynamicCache(config=model.config), torch.arange(CONTEXT)[None]
    model(ids, cache=cache, logits_to_keep=1)
    begun = time.process_time()
    for _ in range(4):
        model(ids[:, -1:], cache=cache)
    return (time.process_time() - begun) / 4


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step reads."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def in_llamacpp(folder: Path, file: Path) -> float:
    """Tokens per second of llama.cpp, one thread, best of five rounds."""
    command = [folder / "llama-bench", "-m", file, "-p", "0", "-n", "16", "-t", "1", "-r", "5", "-o", "json"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return max(json.loads(ran.stdout)[0]["samples_ts"])


def main() -> None:
    """Make both models, and print a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("blocks", 16), ("width", 2048), ("inner", 5632)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--llamacpp", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        dense, small = Path(name) / "dense", Path(name) / "small"
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000, hidden_size=options.width, intermediate_size=options.inner, dtype="bfloat16",
            num_hidden_layers=options.blocks, num_attention_heads=options.width // 64,
            num_key_value_heads=options.width // 256,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        print(f"{model.num_parameters() / 1e6:.0f}M parameters", flush=True)
        model.save_pretrained(dense)
        slim(dense, 0.25, small, units="channels,heads", method="magnitude")
        models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (dense, small)]
        times = [[step(m) for m in models] for _ in range(ROUNDS)]
        before, after = (statistics.median(column) for column in zip(*times, strict=True))
        allowed = read_bytes(models[0]) / read_bytes(models[1])
        found = f"{1000 * before:.1f} and {1000 * after:.1f} ms, {before / after:.3f} times as fast"
        print(f"transformers: {found}; bytes allow {allowed:.3f}: {before / after / allowed:.0%}", flush=True)
        if options.llamacpp:
            files = [export_gguf(path, path.with_suffix(".gguf"), kind="f16").path for path in (dense, small)]
            slow, fast = (in_llamacpp(options.llamacpp, file) for file in files)
            found = f"{slow:.1f} and {fast:.1f} tokens/s, {fast / slow:.3f} times as fast"
            print(f"llama.cpp: {found}: {fast / slow / allowed:.0%} of what bytes allow", flush=True)


if __name__ == "__main__":
    main()
