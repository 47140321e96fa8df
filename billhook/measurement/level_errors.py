"""Level errors: the relative error of each layer's output at each storage type.

    e_l(v) = ‖(W − W_v) X‖² / ‖W X‖²   for every type v of a menu

The layer is quantized alone and sees the dense model's inputs X. GPTQ runs without sweeps on `ROWS` of its rows, spread
evenly. Its Gram matrix is shrunk as in GPTQ, in the error too, so that errors on a short text are those to expect on
other text. A type whose blocks do not divide the layer's columns has no entry.

Cost: one pass of the text through the dense model with its Gram matrices, and one factorization of each. Layers with
the same input (query, key and value; gate and up) share it, and their rows are quantized together. One block at a time
is in memory if the model is streamed.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch, main_input
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Block, Progress, walk
from billhook.measurement.error_curves import finite
from billhook.methods.least_squares import inverse_factor, noise_share
from billhook.methods.quantize.gptq import feedback
from billhook.methods.quantize.grid import Quantized
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest
from billhook.methods.statistics import LayerStats

ROWS = 64
LEAST = 1e-9
_DAMPING = 0.01  # the default of `gptq`


@dataclass(frozen=True)
class LevelErrors:
    """`errors` by layer name and type; `power` is the mean over tokens of ‖W x‖² by layer name."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def level_errors(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    menus: Mapping[str, Sequence[str]],
    scale_dtype: torch.dtype = torch.float16,
    *,
    known: LevelErrors | None = None,
    measured: Callable[[LevelErrors], None] = lambda found: None,
    resources: Resources = IN_MEMORY,
    progress: Progress = lambda layer: None,
) -> LevelErrors:
    """The errors of `layers` for the types in `menus`, by layer name.

    Layers that are `known` from an earlier run are not measured again; `measured` is called after every other block
    with all that is known then.
    """
    found = LevelErrors() if known is None else LevelErrors(dict(known.errors), dict(known.power))
    wanted = {layer.name for layer in layers} - found.errors.keys()
    tokens = sum(main_input(model, batch).shape[:2].numel() for batch in batches)
    for block in walk(model, batches, ("gram",), read_only=True, resources=resources):
        for group in _same_input(block, wanted):
            _measure(group, block.stats_of(group[0]), tokens, menus, scale_dtype, found)
            for layer in group:
                progress(layer.name)
        if any(layer.name in wanted for layer in block.layers):
            measured(found)
    return found


def _same_input(block: Block, wanted: Collection[str]) -> list[list[Layer]]:
    """The `wanted` layers of a block, by name, in groups that share one Gram matrix."""
    groups: dict[int, list[Layer]] = {}
    for layer in (layer for layer in block.layers if layer.name in wanted):
        gram = block.stats_of(layer).gram
        assert gram is not None
        groups.setdefault(gram.data_ptr(), []).append(layer)
    return list(groups.values())


def _measure(
    layers: Sequence[Layer],
    stats: LayerStats,
    tokens: int,
    menus: Mapping[str, Sequence[str]],
    scale_dtype: torch.dtype,
    found: LevelErrors,
) -> None:
    """Add the errors of layers with the same input; `tokens` are all tokens of the text."""
    parts = [_sampled(layer) for layer in layers]
    W = torch.cat(parts)
    gram = stats.gram if stats.gram is not None and stats.tokens else torch.eye(W.shape[1], device=W.device)
    share = noise_share(len(gram), stats.tokens)
    whole = [_energy(part, gram) for part in parts]
    for layer, part, energy in zip(layers, parts, whole, strict=True):
        power = finite(energy, layer) * layer.shape[0] / len(part) / max(tokens, 1)
        found.power[layer.name] = power if stats.tokens else 0.0
        found.errors[layer.name] = {}
    for type, made in _quantized(W, gram, stats, dict.fromkeys(t for x in layers for t in menus[x.name]), scale_dtype):
        differences = (W - made.decode(torch.float32)).split([len(part) for part in parts])
        for layer, D, energy in zip(layers, differences, whole, strict=True):
            if type in menus[layer.name]:
                error = (1 - share) * _energy(D, gram) + share * float(D.square().sum(0) @ gram.diagonal())
                found.errors[layer.name][type] = max(finite(error / max(energy, 1e-30), layer), LEAST)


def _quantized(
    W: Tensor, gram: Tensor, stats: LayerStats, types: Iterable[str], scale_dtype: torch.dtype
) -> Iterator[tuple[str, Quantized]]:
    """W on the grid of every type: by GPTQ, or rounded where the layers received no token."""
    if stats.tokens:
        share = noise_share(len(gram), stats.tokens)
        U = inverse_factor(gram, gram.diagonal() <= 0, _DAMPING, replace(stats, notes=[]), share)
    for type in types:
        grid = grid_of(type, scale_dtype)
        yield type, feedback(W, U, grid, W == 0 if grid.has_zero else None) if stats.tokens else nearest(W, stats, grid)


def _sampled(layer: Layer) -> Tensor:
    """Some rows of a layer's weight, float32."""
    rows = torch.linspace(0, layer.shape[0] - 1, min(ROWS, layer.shape[0]), dtype=torch.float64).round().long()
    return layer.weight[rows.to(layer.weight.device)].float()


def _energy(W: Tensor, gram: Tensor) -> float:
    """‖W X‖² for gram = X Xᵀ."""
    return float(((W @ gram) * W).sum(dtype=torch.float64))
