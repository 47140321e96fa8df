"""Tokens per second of a random Llama of the 1B class: dense bfloat16 in transformers against packed at several
sparsities.

    python benchmarks/decode.py                       decode steps, one token each after a context of 64
    python benchmarks/decode.py --generate 16         whole calls of `generate` instead, with this number of new tokens
    python benchmarks/decode.py --prefill 16,128,512  the prompt instead

16 blocks x 2048, MLP 5632, vocabulary 32000, built from its config; masks are random. Models take turns; medians of
quiet rounds (see quiet_timing.py), speed relative to the dense model in the same run. `own kernel` is the dense model
with our dense kernel in all its layers: the part of the gain that is not due to sparsity.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable

import torch
from quiet_timing import median, rounds, spread
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from billhook.runtime import library
from billhook.runtime.linear import SparseLinear
from billhook.runtime.tuning import choices, tune_

TARGETS = {50: 2.2, 60: 2.6, 70: 3.0, 80: 3.5}
CONTEXT = 64


def build(blocks: int, width: int, inner: int) -> LlamaForCausalLM:
    """The dense model, bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def pack(model: LlamaForCausalLM, percent: int) -> LlamaForCausalLM:
    """A copy with every linear layer of the blocks packed after a random mask; embeddings, norms and head are
    shared."""
    generator = torch.Generator().manual_seed(percent)
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)
    for block in twin.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    keep = torch.rand(child.weight.shape, generator=generator) >= percent / 100
                    setattr(parent, name, SparseLinear.from_dense(child.weight.detach().masked_fill(~keep, 0)))
    return twin


def step(model: LlamaForCausalLM) -> Callable[[int], object]:
    """One decode step after a context of 64 tokens, whose length stays the same."""
    cache = DynamicCache(config=model.config)
    model(torch.arange(CONTEXT)[None], cache=cache)
    token = torch.tensor([[7]])

    def run(turn: int) -> None:
        model(token, cache=cache).logits.argmax()
        cache.crop(-1)

    return run


def prompt(model: LlamaForCausalLM, tokens: int) -> Callable[[int], object]:
    """The forward pass of a prompt, with the logits of its last token."""
    ids = torch.arange(tokens)[None]
    return lambda turn: model(ids, logits_to_keep=1)


def generation(model: LlamaForCausalLM, new: int) -> Callable[[int], object]:
    """A call of transformers' generate."""
    ids = torch.arange(CONTEXT)[None]
    fixed = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return lambda turn: model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)


def main() -> None:
    """Read the options, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sparsity", default="50,60,70,80")
    parser.add_argument("--shape", default="16x2048x5632", help="blocks x width x MLP width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=120, help="time limit of the measurement")
    parser.add_argument("--generate", type=int, default=0)
    parser.add_argument("--prefill", default="")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dense = build(*map(int, args.shape.split("x")))
    own = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    models = {"dense": dense, "own kernel": own} | {
        f"{percent} %": pack(dense, int(percent)) for percent in args.sparsity.split(",")
    }
    start = time.perf_counter()
    with torch.inference_mode():
        for name, model in models.items():
            if name != "dense":
                tune_(model)
        tuned_s = time.perf_counter() - start
        jobs: dict[str, Callable[[LlamaForCausalLM], Callable[[int], object]]] = {"decode": step}
        if args.generate:
            jobs = {f"generate {args.generate}": lambda model: generation(model, args.generate)}
        if args.prefill:
            jobs = {f"prefill {n}": lambda model, n=int(n): prompt(model, n) for n in args.prefill.split(",")}  # type: ignore[misc]
        results = []
        for job, make in jobs.items():
            variants = {name: make(model) for name, model in models.items()}
            times, discarded = rounds(variants, args.rounds, args.seconds)
            middle = {name: median(values) for name, values in times.items()}
            speed = {name: middle["dense"] / seconds for name, seconds in middle.items()}
            results.append({"job": job, "speed": speed, "dense_ms": 1e3 * middle["dense"], "discarded": discarded})
            if not args.json:
                print(
                    f"{job}: dense {1e3 * middle['dense']:.1f} ms; speed "
                    + ", ".join(f"{name} {s:.2f}" for name, s in speed.items())
                )
                worst = max(spread(values) for values in times.values())
                print(f"  spread {worst:.0%}, {len(times['dense'])} quiet rounds, {discarded} discarded", flush=True)
    about = library.about() | {"tuning_s": tuned_s, "parameters": sum(p.numel() for p in dense.parameters())}
    if args.json:
        print(
            json.dumps(
                {"about": about, "results": results, "choices": choices(models[f"{args.sparsity.split(',')[-1]} %"])},
                indent=1,
            )
        )
    else:
        print(about)


if __name__ == "__main__":
    main()
