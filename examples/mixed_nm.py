"""Mixed N:8 patterns: each layer keeps its own N of every 8 weights, 4 of 8 on average.

An allocator says how much each layer loses. With an N:M pattern its shares are rounded to whole N such that the average
is the pattern's N.
"""

from collections import Counter
from pathlib import Path

from transformers import AutoTokenizer

import billhook

MODEL = Path(billhook.__file__).parent / "demo_model"


def main() -> None:
    """Allocate by OWL's outlier ratios, prune, and count the patterns."""
    model = billhook.load_model(MODEL, dtype="float32")
    tokens = billhook.load_calibration("stdlib:train", AutoTokenizer.from_pretrained(MODEL), samples=16, length=128)
    batches = tokens.ids.split(8)
    table = billhook.measure(model, ["outlier_ratio:5"], batches=batches)
    plan = billhook.allocate(table, None, allocator="owl", pattern="4:8", lam=0.15)
    results = billhook.prune_(model, plan, criterion="wanda", batches=batches)

    kept = Counter(round(8 * (1 - share)) for share in plan.sparsity.values())
    print(", ".join(f"{count} layers keep {n}:8" for n, count in sorted(kept.items())))
    print(f"{sum(r.zeros for r in results) / sum(r.n for r in results):.2%} of the weights removed.")


if __name__ == "__main__":
    main()
