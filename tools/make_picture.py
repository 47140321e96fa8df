"""Draw docs/images/demo.svg: perplexity of the bundled model by sparsity, for three criteria and the default recipe.

    python tools/make_picture.py            some minutes on two cores; prints the numbers as well

The calibration text is the standard library's training modules, the evaluation text the held-out ones, as in
`billhook demo`.
"""

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory

from billhook import allocate, evaluate, load_model, measure, prune, prune_
from billhook.demo import MODEL, TEXT, evaluation_windows
from billhook.plan.recipes import DEFAULT
from billhook.reports.charts import Series, chart
from billhook.reports.scales import Axis
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import open_request

SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
NAMES = ("magnitude", "wanda", "sparsegpt")


def numbers() -> tuple[float, dict[str, list[float]]]:
    """Dense perplexity, and criterion (with the uniform allocation) or recipe -> perplexity at each sparsity."""
    opened = open_request(ModelRequest(MODEL, **TEXT), True, "The picture")
    windows = evaluation_windows()
    table = measure(opened.model, [])
    found: dict[str, list[float]] = {name: [] for name in (*NAMES, DEFAULT)}
    for sparsity in SPARSITIES:
        for name in NAMES:
            model = copy.deepcopy(opened.model)
            prune_(model, allocate(table, sparsity), criterion=name, batches=opened.batches)
            found[name].append(evaluate(model, windows).token_ppl)
        with TemporaryDirectory() as folder:
            prune(MODEL, sparsity=sparsity, output=Path(folder) / "pruned", **TEXT)
            model = load_model(Path(folder) / "pruned", dtype="float32")
        found[DEFAULT].append(evaluate(model, windows).token_ppl)
        print(sparsity, {name: f"{values[-1]:.2f}" for name, values in found.items()}, flush=True)
    return evaluate(opened.model, windows).token_ppl, found


def draw(dense: float, found: dict[str, list[float]], path: Path) -> None:
    """A line for each criterion and for the recipe, and the dense model as a dashed line."""
    x = [100 * sparsity for sparsity in SPARSITIES]
    series = [Series(f"{name}, the default" if name == DEFAULT else name, x, values) for name, values in found.items()]
    series.append(Series("dense", x, [dense] * len(x), marks=False, colour=-1, dash=1))
    axes = Axis("sparsity (%)"), Axis("perplexity on held-out text", log=True)
    title = "Perplexity of the bundled model by sparsity (lower is better)"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chart(title, series, *axes, standalone=True), encoding="utf-8")


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
