"""File size, memory and tokens per second of packed models against the dense one, at 50 to 80 % sparsity.

    python benchmarks/packed.py --model demo --folder packed
    python benchmarks/packed.py --model 1b,demo --folder packed --picture docs/images/packed.svg

`demo` is the bundled model, pruned by magnitude; `1b` is a random Llama of the 1B class (16 blocks x 2048, MLP 5632,
vocabulary 32000) in bfloat16 with random masks, which shows speed and not quality. The directories are made in
`--folder` once and then measured as `billhook bench` does: each in its own process, in turns, medians and quartiles.
The picture shows the first batch size and prompt length.
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
from billhook.packed import benchmark
from billhook.packed.benchmark import Side
from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.store.files import write_text

LEVELS = (50, 60, 70, 80)
NAMES = {"demo": "bundled", "1b": "1B-class"}
DEMO = Path(billhook.__file__).parent / "demo_model"


def make_demo(folder: Path) -> Path:
    """The bundled model and its packed forms; returns the dense one."""
    for percent in LEVELS:
        billhook.prune(
            DEMO, sparsity=percent / 100, criterion="magnitude", output=folder / f"demo-{percent}", pack=True
        )
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
    for percent in LEVELS:  # the masks are nested: the same random scores with increasing thresholds
        with torch.no_grad():
            for name, score in scores.items():
                model.get_parameter(name).masked_fill_(score < percent / 100, 0)
        model.save_pretrained(folder / "sparse")
        billhook.pack(folder / "sparse", folder / f"1b-{percent}")
        shutil.rmtree(folder / "sparse")
    return folder / "1b-dense"


def measured(model: str, args: argparse.Namespace) -> list[Side]:
    """Measure the dense model and its packed forms, after making those that are missing; nothing with --make-only."""
    dense = args.folder / f"{model}-dense"
    if not dense.exists():
        (make_demo if model == "demo" else make_large)(args.folder)
    if args.make_only:
        return []
    prompts, batches = ([int(word) for word in words.split(",")] for words in (args.prompt, args.batch))
    packed = [args.folder / f"{model}-{percent}" for percent in LEVELS]
    return benchmark.bench(packed, against=dense, batches=batches, prompts=prompts, new=args.new, rounds=args.rounds)


def picture(found: dict[str, list[Side]]) -> str:
    """Speed-up and size ratio of each model against its dense form, by sparsity, as SVG."""
    series = []
    for colour, (model, (dense, *packed)) in enumerate(found.items()):
        x = [100 * (side.sparsity or 0.0) for side in packed]
        speed = [ratio for side in packed if (ratio := side.cells[0].decode_speedup) is not None]
        bands = ([ratio.median for ratio in speed], [ratio.low for ratio in speed], [ratio.high for ratio in speed])
        series.append(Series(f"{NAMES[model]}: speed", x, *bands, colour=colour))
        sizes = [dense.file_bytes / side.file_bytes for side in packed]
        series.append(Series(f"{NAMES[model]}: size", x, sizes, colour=colour, dash=1))
    axes = Axis("sparsity (%)"), Axis("speed-up, size ratio", zero=True)
    return chart(
        "Packed models against dense ones", series, *axes, summary="Bands: quartiles over the rounds.", standalone=True
    )


def main() -> None:
    """Make the missing models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="demo, 1b or both: 1b,demo")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompt", default="128")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--make-only", action="store_true")
    args = parser.parse_args()
    models = args.model.split(",")
    if not set(models) <= NAMES.keys():
        parser.error(f"--model {args.model}: there are {' and '.join(NAMES)}")
    args.folder.mkdir(exist_ok=True)
    found = {model: measured(model, args) for model in models}
    if args.make_only:
        return
    for sides in found.values():
        show(sides)
        print(json.dumps([asdict(side) for side in sides]))
    if args.picture is not None:
        write_text(args.picture, picture(found))


if __name__ == "__main__":
    main()
