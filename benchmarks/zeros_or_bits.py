"""What zeros and what fewer bits lose at equal size: KL divergence from the dense model by bits a weight in the blocks.

    python benchmarks/zeros_or_bits.py MODEL --calibration c4.jsonl --data wiki.test.raw --folder rows

* `bits`: `billhook quantize --type intB/64`, B + 1/4 bits a weight.
* `zeros`: `billhook prune --criterion admm`, the rest in 16 bits, and one bit a weight that says which are zero.
* `both`: the pruned model quantized, every zero in its place: one bit a weight, and B + 1/4 for those that are left.

All are calibrated on the same windows, block by block in float32, with the same sparsity and type in every layer, and
scored by `billhook eval --against` on the first --limit windows of --data, on which nothing is chosen. Rows are added
to FOLDER/zeros_or_bits.jsonl as they come, and those that are there are not measured again.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from front import billhook

from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.store.files import write_text

GROUP = 64
SCALE = 16 / GROUP  # bits of a scale by weight


class Point(NamedTuple):
    """A fraction of zeros, and the bits of the weights that are left, 16 where they are not quantized."""

    sparsity: float
    bits: int

    @property
    def kind(self) -> str:
        """What is taken away."""
        return "both" if self.sparsity and self.bits < 16 else "zeros" if self.sparsity else "bits"

    @property
    def stored(self) -> float:
        """Bits a weight."""
        each = self.bits + (SCALE if self.bits < 16 else 0)
        return (1 - self.sparsity) * each + (1 if self.sparsity else 0)


POINTS = (
    *(Point(0, bits) for bits in (2, 3, 4, 6, 8)),
    *(Point(sparsity, 16) for sparsity in (0.3, 0.5, 0.7)),
    *(Point(sparsity, bits) for sparsity in (0.3, 0.5) for bits in (3, 4, 8)),
)


def measure(args: argparse.Namespace, point: Point) -> dict[str, Any]:
    """Make the model of a point, and score it."""
    text = ["--calibration", args.calibration, "--samples", str(args.samples), "--length", str(args.length)]
    pruned, made = args.folder / f"pruned-{point.sparsity}", args.folder / "quantized"
    if point.sparsity and not (pruned / "billhook.json").exists():
        how = ["--criterion", "admm", "--allocator", "uniform", "--sparsity", str(point.sparsity)]
        billhook("prune", args.model, *how, *text, "--overwrite", "--output", pruned)
    if point.bits < 16:
        source = pruned if point.sparsity else args.model
        kind = f"int{point.bits}/{GROUP}"
        billhook("quantize", source, "--type", kind, *text, "--overwrite", "--output", made)
    scored = made if point.bits < 16 else pruned
    where = ["--data", args.data, "--length", str(args.length), "--limit", str(args.limit)]
    printed, *_ = billhook("eval", scored, *where, "--against", args.model, "--json")
    found = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    shutil.rmtree(made, ignore_errors=True)
    against = found["against"]
    scores = {"kl": against["kl"], "error": against["kl_error"], "top1": against["top1_agreement"]}
    return {**scores, "perplexity": found["token_ppl"], "dense": against["token_ppl"]}


def picture(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Loss by bits a weight, a line for each way, as SVG."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        both = f"{row['sparsity']:.0%} zeros, the rest in fewer bits"
        label = {"bits": "fewer bits", "zeros": "zeros", "both": both}[row["kind"]]
        found.setdefault(label, []).append((row["stored"], row["kl"]))
    series = [Series(label, *map(list, zip(*sorted(points), strict=True))) for label, points in found.items()]
    axes = Axis("bits a weight, as stored"), Axis("KL divergence, nats a token", log=True)
    summary = "Measured on WikiText-2. Lower is better."
    return chart(f"{name}: zeros or bits", series, *axes, summary=summary, standalone=True)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table, by size."""
    lines = ["| bits a weight | zeros | bits of the rest | KL | same top | perplexity |", "|" + " --- |" * 6]
    for row in sorted(rows, key=lambda row: -row["stored"]):
        zeros = f"{row['sparsity']:.0%}".replace("%", " %") if row["sparsity"] else ""
        scores = f"{row['kl']:.4f} ± {row['error']:.4f} | {row['top1']:.1%} | {row['perplexity']:.2f}"
        lines.append(f"| {row['stored']:.2f} | {zeros} | {row['bits']} | {scores} |".replace("%", " %"))
    return "\n".join(lines).replace("  %", " %")


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on, such as C4")
    parser.add_argument("--data", type=Path, required=True, help="text to score, such as WikiText-2's raw test text")
    parser.add_argument("--folder", type=Path, required=True, help="where models are made and rows are kept")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--limit", type=int, default=16, help="windows that are scored")
    parser.add_argument("--name", default="", help="what the picture calls the model")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / "zeros_or_bits.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for point in POINTS:
        if not any((row["sparsity"], row["bits"]) == point for row in rows):
            rows.append({**point._asdict(), "kind": point.kind, "stored": point.stored, **measure(args, point)})
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(point, flush=True)
    print(markdown(rows))
    if args.picture is not None:
        write_text(args.picture, picture(rows, args.name or args.model.resolve().name))


if __name__ == "__main__":
    main()
