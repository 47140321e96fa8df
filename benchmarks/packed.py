"""What packing gives: file size, memory and tokens a second of packed models against the dense one, at 50 to 80 %.

    python benchmarks/packed.py --model demo --folder packed
    python benchmarks/packed.py --model 1b --folder packed --picture docs/images/packed.svg

`demo` is the bundled model, pruned by magnitude; `1b` a random Llama of the 1B class (16 blocks x 2048, MLP 5632, vocabulary 32000) in
bfloat16 with random masks, which says nothing of quality and all of speed. The directories are made in `--folder` once and then
measured as `billhook bench` does: each in its own process, in turns, medians and quartiles.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import billhook
from billhook.cli.bench import show
from billhook.files import write_text
from billhook.runtime import benchmark

LEVELS = (50, 60, 70, 80)
DEMO = Path(billhook.__file__).parent / "demo_model"


def make_demo(folder: Path) -> Path:
    """The bundled model and its packed forms; returns the dense one."""
    for percent in LEVELS:
        billhook.prune(DEMO, sparsity=percent / 100, criterion="magnitude", output=folder / f"demo-{percent}", pack=True)
    return Path(shutil.copytree(DEMO, folder / "demo-dense"))


def make_large(folder: Path) -> Path:
    """A random model and its packed forms; returns the dense one."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, **heads)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder / "1b-dense")
    scores = {name: torch.rand(w.shape) for name, w in model.named_parameters() if "layers" in name and w.ndim == 2}
    for percent in LEVELS:  # the masks are nested: the same random scores, cut at rising levels
        with torch.no_grad():
            for name, score in scores.items():
                model.get_parameter(name).masked_fill_(score < percent / 100, 0)
        model.save_pretrained(folder / "sparse")
        billhook.pack(folder / "sparse", folder / f"1b-{percent}")
        shutil.rmtree(folder / "sparse")
    return folder / "1b-dense"


def main() -> None:
    """Make what is not there yet, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["demo", "1b"], default="demo")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompt", default="128")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--make-only", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    dense = args.folder / f"{args.model}-dense"
    if not dense.exists():
        (make_demo if args.model == "demo" else make_large)(args.folder)
    if args.make_only:
        return
    numbers = {key: [int(word) for word in getattr(args, key).split(",")] for key in ("prompt", "batch")}
    packed = [args.folder / f"{args.model}-{percent}" for percent in LEVELS]
    sides = benchmark.bench(packed, against=dense, batches=numbers["batch"], prompts=numbers["prompt"], new=args.new, rounds=args.rounds)
    show(sides)
    print(json.dumps([asdict(side) for side in sides]))
    if args.picture is not None and (drawn := benchmark.picture(sides)) is not None:
        write_text(args.picture, drawn)


if __name__ == "__main__":
    main()
