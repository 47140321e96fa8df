"""Try a criterion of your own: the whole pruning algorithm is one loop, so write the loop.

`walk` yields the blocks in depth order, with the statistics of each layer's inputs; what the loop does to a block
changes the inputs of the next. `Select` turns scores into a mask with the exact count. See also docs/add_a_method.md.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer

import billhook
from billhook.engine.walk import walk
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats

MODEL = Path(billhook.__file__).parent / "demo_model"


def damped_wanda(W: torch.Tensor, stats: LayerStats, select: Select, *, power: float = 0.5) -> torch.Tensor:
    """Remove the smallest |W_ij| * ||X_j||^power: power 0 is magnitude, 1 is Wanda."""
    return W.masked_fill(~select(W.abs() * stats.input_norm**power), 0)


def main() -> None:
    """Prune every layer of the bundled model by half."""
    model = billhook.load_model(MODEL, dtype="float32")
    batches = billhook.load_calibration(
        "stdlib:train", AutoTokenizer.from_pretrained(MODEL), samples=16, length=128
    ).ids.split(8)
    for block in walk(model, batches, statistics=("input_norm",)):
        for layer in block.layers:
            select = Select(layer.shape, sparsity=0.5, zeros=layer.weight.numel() // 2)
            layer.weight.copy_(damped_wanda(layer.weight, block.stats[layer.name], select))
        print(f"block {block.index}: {sum(int((layer.weight == 0).sum()) for layer in block.layers)} weights removed")


if __name__ == "__main__":
    main()
