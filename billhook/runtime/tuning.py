"""Make a loaded model fast on this machine: measure or recall the best way of every layer, and let our dense kernel serve the rest."""

from typing import Any

import torch
from torch import nn

from billhook.runtime import calibrate, library
from billhook.runtime.dense import DenseLinear, adopt_
from billhook.runtime.linear import SparseLinear
from billhook.runtime.native import Weight

WORTH = 1 << 20  # weights from which a dense layer is worth a measurement


@torch.no_grad()
def tune_(model: nn.Module) -> list[dict[str, Any]]:
    """Choose for every layer how it multiplies, and return `choices`.

    Dense bfloat16 `nn.Linear` layers on the CPU for which our kernel is faster become `DenseLinear`, with the same parameters. What is
    measured (some seconds for a new model on a new machine) is kept in the user's cache. Nothing on other devices is touched.
    """
    calibrate.recall()
    for module in model.modules():
        if isinstance(module, SparseLinear) and module.bitmask.device.type == "cpu":
            calibrate.measure_packed(module.packed(), _activations(module))
        elif type(module) is nn.Linear and library.active() and _ours(module):
            adopt_(module)
    calibrate.keep()
    return choices(model)


def choices(model: nn.Module) -> list[dict[str, Any]]:
    """Per layer that is packed or has our dense kernel: `layer`, `shape`, `sparsity`, `values` (dtype) and `ways`, {tokens: way}."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            weight, dtype = module.packed(), _activations(module)
            ways = {tokens: calibrate.way(weight, dtype, tokens) for tokens in calibrate.BUCKETS}
            sparsity = 1 - int(module.row_starts[-1]) / (weight.shape[0] * weight.shape[1])
        elif isinstance(module, DenseLinear):
            weight = Weight(*module.weight.shape, module.weight.detach())
            ways = {tokens: calibrate.dense_way(weight, module.weight.dtype, tokens) for tokens in calibrate.BUCKETS}
            sparsity = 0.0
        else:
            continue
        values = str(weight.tensors[0].dtype).removeprefix("torch.")
        found.append({"layer": name, "shape": list(weight.shape), "sparsity": sparsity, "values": values, "ways": ways})
    return found


def _activations(layer: SparseLinear) -> torch.dtype:
    """The dtype that a layer's inputs will most likely have."""
    return layer.values.dtype if layer.values.is_floating_point() else torch.bfloat16


def _ours(layer: nn.Linear) -> bool:
    weight = layer.weight.detach()
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or weight.numel() < WORTH or not weight.is_contiguous():
        return False
    return calibrate.measure_dense(Weight(*weight.shape, weight), torch.bfloat16)
