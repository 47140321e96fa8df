"""Draw docs/images/demo.svg: what each criterion leaves of the bundled model, by how much was removed.

    python tools/make_picture.py            a few minutes on two cores; prints the numbers as well

Calibration text is the standard library's training modules, evaluation text the held-out ones, as in `billhook demo`.
"""

import argparse
import copy
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from billhook import CRITERIA, allocate, evaluate, load_windows, measure, prune_
from billhook.demo import EVALUATION_WINDOWS, LENGTH, MODEL, SAMPLES
from billhook.steps.request import Request, open_request
from billhook.store.checkpoint import load_tokenizer

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
STYLE = {"magnitude": ("#b5532d", "o"), "wanda": ("#2f6db3", "s"), "sparsegpt": ("#1d7a4f", "D")}


def numbers() -> tuple[float, dict[str, list[float]]]:
    """Dense perplexity, and criterion -> perplexity at each sparsity, uniform allocation."""
    request = Request(MODEL, calibration="stdlib:train", samples=SAMPLES, length=LENGTH, dtype="float32")
    opened = open_request(request, True, "The picture")
    windows = load_windows("stdlib:heldout", load_tokenizer(MODEL), length=LENGTH, limit=EVALUATION_WINDOWS)
    table = measure(opened.model, [])
    found: dict[str, list[float]] = {name: [] for name in CRITERIA.names() if name in STYLE}
    for sparsity in SPARSITIES:
        for name, values in found.items():
            model = copy.deepcopy(opened.model)
            prune_(model, allocate(table, sparsity), criterion=name, batches=opened.batches)
            values.append(evaluate(model, windows).token_ppl)
            print(f"{name:<10} {sparsity:.1f}  {values[-1]:.2f}", flush=True)
    return evaluate(opened.model, windows).token_ppl, found


def draw(dense: float, found: dict[str, list[float]], path: Path) -> None:
    """One line a criterion, the dense model as a dashed line, each named where it ends."""
    plt.rcParams.update(
        {"font.family": "sans-serif", "font.size": 11, "svg.hashsalt": "billhook", "svg.fonttype": "none"}
    )
    figure, axes = plt.subplots(figsize=(7.6, 4.2))
    axes.axhline(dense, color="#666666", linestyle="--", linewidth=1)
    axes.annotate(
        f"unpruned model, {dense:.1f}", (SPARSITIES[0], dense), (0, -14), textcoords="offset points", color="#444444"
    )
    for name, values in found.items():
        color, marker = STYLE[name]
        axes.plot(SPARSITIES, values, color=color, marker=marker, linewidth=2, markersize=6)
        axes.annotate(
            name, (SPARSITIES[-1], values[-1]), (9, -4), textcoords="offset points", color=color, fontweight="bold"
        )
    axes.set_yscale("log")
    top = max(max(values) for values in found.values())
    ticks = [
        t
        for t in (5, 7, 10, 12, 15, 20, 25, 30, 40, 50, 70, 100, 150, 200, 300, 500, 1000)
        if dense * 0.8 <= t <= top * 1.1
    ]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(dense * 0.85, top * 1.2)
    axes.set_xlim(SPARSITIES[0] - 0.02, SPARSITIES[-1] + 0.09)
    axes.set_xticks(SPARSITIES, [f"{s:.0%}" for s in SPARSITIES])
    axes.set_xlabel("weights removed")
    axes.set_ylabel("perplexity on unseen text (lower is better)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images" / "demo.svg")
    options = parser.parse_args()
    dense, found = numbers()
    print(f"dense {dense:.2f}")
    draw(dense, found, options.output)


if __name__ == "__main__":
    main()
