"""Prepare a loaded model for fast inference on this machine: choose a kernel for every layer."""

from typing import Any

import torch
from torch import nn

from billhook.runtime import autotune, gpu, library
from billhook.runtime.linear import DenseLinear, SparseLinear, adopt_, is_supported
from billhook.runtime.native import Weight

MIN_DENSE_WEIGHTS = 1 << 20  # smaller dense layers are not measured


@torch.no_grad()
def tune_(model: nn.Module) -> list[dict[str, Any]]:
    """Choose for every layer how it multiplies, and return `choices`.

    Dense bfloat16 `nn.Linear` layers on the CPU for which our kernel is faster become `DenseLinear` with the same
    parameters. Measurements, some seconds for a new model on a new machine, are cached.
    """
    autotune.load_choices()
    dtype = _activations(model)
    for module in model.modules():
        if isinstance(module, SparseLinear) and module.bitmask.device.type == "cpu":
            autotune.measure_packed(module.packed(), dtype)
        elif isinstance(module, SparseLinear) and module.bitmask.is_cuda:
            gpu.prepare(module, dtype)
        elif type(module) is nn.Linear and library.active() and _ours(module):
            adopt_(module)
    autotune.store_choices()
    return choices(model)


def choices(model: nn.Module) -> list[dict[str, Any]]:
    """`layer`, `shape`, `sparsity`, `values` (dtype) and `ways` by tokens, for each packed layer and DenseLinear."""
    found, activations = [], _activations(model)
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            values, ways = module.values, _ways(module, activations)
            sparsity = 1 - int(module.row_starts[-1]) / (module.out_features * module.in_features)
        elif isinstance(module, DenseLinear) and not module.weight.is_cuda:
            values, sparsity = module.weight.detach(), 0.0
            weight = Weight(*values.shape, values)
            ways = {tokens: autotune.dense_way(weight, values.dtype, tokens) for tokens in autotune.BUCKETS}
        else:
            continue
        shape, dtype = [module.out_features, module.in_features], str(values.dtype).removeprefix("torch.")
        found.append({"layer": name, "shape": shape, "sparsity": sparsity, "values": dtype, "ways": ways})
    return found


def _ways(layer: SparseLinear, activations: torch.dtype) -> dict[int, str]:
    if layer.bitmask.is_cuda:
        return gpu.ways(layer, activations)
    return {tokens: autotune.way(layer.packed(), activations, tokens) for tokens in autotune.BUCKETS}


def _activations(model: nn.Module) -> torch.dtype:
    """The assumed dtype of the inputs of layers: that of the model's parameters, or of its packed values."""
    kept = (module.values for module in model.modules() if isinstance(module, SparseLinear))
    return next((tensor.dtype for tensor in (*model.parameters(), *kept) if tensor.is_floating_point()), torch.bfloat16)


def _ours(layer: nn.Linear) -> bool:
    """Whether our kernel supports a dense layer and is faster than torch's."""
    weight = layer.weight.detach()
    if weight.numel() < MIN_DENSE_WEIGHTS or not is_supported(weight):
        return False
    return autotune.measure_dense(Weight(*weight.shape, weight), torch.bfloat16)
