"""Prune a model that is in memory already, and score it before and after. Nothing is written.

The pieces here are those the command line is made of: calibration windows, a table, a plan, `prune_` (the underscore
says that it changes its argument), and perplexity.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import billhook

MODEL = Path(billhook.__file__).parent / "demo_model"


def main() -> None:
    """Load with transformers, prune in place, compare perplexities."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batches = billhook.load_calibration("stdlib:train", tokenizer, samples=16, length=128).ids.split(8)
    windows = billhook.load_windows("stdlib:heldout", tokenizer, length=128, limit=16)

    before = billhook.evaluate(model, windows).token_ppl
    table = billhook.measure(model, ["alpha_peak"])
    plan = billhook.allocate(table, 0.5, allocator="alphapruning", epsilon=0.1)
    results = billhook.prune_(model, plan, criterion="sparsegpt", batches=batches)
    after = billhook.evaluate(model, windows).token_ppl

    zeros, weights = sum(r.zeros for r in results), sum(r.n for r in results)
    print(f"{zeros:,} of {weights:,} weights removed; token perplexity {before:.1f} before, {after:.1f} after.")


if __name__ == "__main__":
    main()
