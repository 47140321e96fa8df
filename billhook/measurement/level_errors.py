"""Level errors: the relative error of each layer's output at each storage type.

    e_l(v) = ‖(W − W_v) X‖² / ‖W X‖²   for every type v of a menu

The layer is quantized alone and sees the dense model's inputs X. GPTQ runs without sweeps on `ROWS` of its rows, spread
evenly. A type whose blocks do not divide the layer's columns has no entry.

Cost: one pass of the text through the dense model with its Gram matrices, and one factorization per layer and type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Progress, walk
from billhook.methods.quantize.gptq import gptq
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest

ROWS = 64
LEAST = 1e-9


@torch.no_grad()
def level_errors(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    menus: Mapping[str, Sequence[str]],
    scale_dtype: torch.dtype = torch.float16,
    *,
    resources: Resources = IN_MEMORY,
    progress: Progress = lambda layer: None,
) -> dict[str, dict[str, float]]:
    """The errors by layer name and type; `menus` are the types of each layer to try."""
    wanted, errors = {layer.name for layer in layers}, dict[str, dict[str, float]]()
    for block in walk(model, batches, ("gram",), read_only=True, resources=resources):
        for layer in block.layers:
            if layer.name not in wanted:
                continue
            stats, W = block.stats[layer.name], layer.weight
            rows = torch.linspace(0, len(W) - 1, min(ROWS, len(W)), dtype=torch.float64).round().long()
            W = W[rows.to(W.device)].float()
            gram = stats.gram if stats.gram is not None and stats.tokens else torch.eye(W.shape[1], device=W.device)
            whole = float(((W @ gram) * W).sum(dtype=torch.float64))
            found = errors.setdefault(layer.name, {})
            for type in menus[layer.name]:
                grid = grid_of(type, scale_dtype)
                if stats.tokens:
                    made = gptq(W, replace(stats, notes=[]), grid, dense_target=0.0, sweeps=0)
                else:
                    made = nearest(W, stats, grid)
                D = W - made.decode(torch.float32)
                found[type] = max(float(((D @ gram) * D).sum(dtype=torch.float64)) / max(whole, 1e-30), LEAST)
            progress(layer.name)
    return errors
