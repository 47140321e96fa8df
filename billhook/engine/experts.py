"""Removing experts of a mixture: what each of them does, which stay, and new down projections for those.

Statistics of all tokens are sums. For methods that compare sets of experts, and for the fit, some tokens are taken at
even distances: at most `COMPARED` numbers are held for the first, and `FITTED` tokens for the second.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer, layers_in
from billhook.architectures.units import Unit
from billhook.engine.observer import products_with
from billhook.engine.routing import Routed, alone, mixture_of, restricted, routed
from billhook.engine.walk import Block
from billhook.methods.structured.experts import EXPERTS, FITS, SWEEPS, ExpertStats, Fit, fitted

COMPARED = 1 << 25  # products of the outputs of two experts for a token
FITTED = 1 << 14  # tokens
_CHUNK = 256  # tokens


@dataclass(frozen=True)
class Choice:
    """The experts that stay, bool [experts], and the changed weights [out, in] of layers by name.

    `error` is the squared change of the mixture's outputs relative to their square; `unseen` counts experts that
    received no token.
    """

    keep: Tensor
    unseen: int
    error: float = 0.0
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def choose_experts(model: PreTrainedModel, unit: Unit, count: int, method: str, block: Block) -> Choice:
    """Which `count` experts of a unit stay, for the inputs of its block; the model is not changed."""
    _, experts = mixture_of(model, unit)
    calls = routed(block, experts)
    stats = expert_stats(model, unit, calls)
    keep: Tensor = EXPERTS.get(method)(stats, count)
    unseen = int((stats.tokens == 0).sum())
    if count == unit.count:
        return Choice(keep, unseen)
    x, chosen, weights = some(calls, FITTED)
    target = experts(x, chosen, weights).float()
    chosen, weights = restricted(model, unit, keep).sends(x)
    missing = target - experts(x, chosen, weights).float()
    stays = keep.tolist()
    layers = [layer for layer in down_projections(model, unit) if stays[layer.expert or 0]]
    new = _fit_(experts, layers, (x, chosen, weights), missing, FITS.get(method, ""))
    error = float(missing.square().sum() / target.square().sum().clamp_min(1e-30))
    return Choice(keep, unseen, error, new)


def _fit_(experts: nn.Module, layers: Sequence[Layer], calls: Routed, missing: Tensor, fit: Fit) -> dict[str, Tensor]:
    """New weights of experts' down projections, with which the outputs [tokens, width] lack less; `missing` changes."""
    x, chosen, weights = calls
    new = dict[str, Tensor]()
    for layer in [*layers] * {"": 0, "mean": 1, "least squares": SWEEPS}[fit]:
        assert layer.expert is not None
        at, place = (chosen == layer.expert).nonzero(as_tuple=True)
        if len(at):
            inputs, g = _inputs(experts, layer, x[at], weights), weights[at, place].float()
            change = fitted(fit, inputs, g, missing[at])
            missing[at] -= g[:, None] * (inputs.float() @ change.T)
            new[layer.name] = new.get(layer.name, layer.weight.float()) + change
    return new


def down_projections(model: PreTrainedModel, unit: Unit) -> list[Layer]:
    """The layers that may change where experts of a unit are removed."""
    _, experts = mixture_of(model, unit)
    return [x for x in layers_in(model, unit.block) if x.module is experts and x.parameter == "down_proj"]


def _inputs(experts: nn.Module, layer: Layer, x: Tensor, like: Tensor) -> Tensor:
    """The inputs of an expert's down projection [tokens, inputs], for tokens that it receives."""
    assert layer.expert is not None
    with products_with(layer) as seen:
        alone(experts, layer.expert, x, like)
    return torch.cat(seen)


@torch.no_grad()
def expert_stats(model: PreTrainedModel, unit: Unit, calls: list[Routed]) -> ExpertStats:
    """Run every expert on the tokens that it receives."""
    _, experts = mixture_of(model, unit)
    tokens, effect, square = (torch.zeros(unit.count, dtype=torch.float64) for _ in range(3))
    mean = torch.zeros(unit.count, calls[0][0].shape[-1])
    for x, chosen, weights in calls:
        for expert in chosen.unique().tolist():
            at, place = (chosen == expert).nonzero(as_tuple=True)
            norms = (output := alone(experts, expert, x[at], weights).float()).norm(dim=1)
            tokens[expert] += len(at)
            effect[expert] += float((weights[at, place].float() * norms).sum())
            square[expert] += float(norms.square().sum())
            mean[expert] += output.sum(0).cpu()
    spread = square - mean.double().square().sum(1) / tokens.clamp_min(1)
    return ExpertStats(tokens, effect, spread, _losses(model, unit, calls))


def _losses(model: PreTrainedModel, unit: Unit, calls: list[Routed]) -> Callable[[Tensor], Tensor]:
    """See `ExpertStats.losses`; what the experts return is computed at the first call."""
    _, experts = mixture_of(model, unit)
    x, chosen, weights = some(calls, max(_CHUNK, COMPARED // unit.count**2))
    dense = _spread(chosen, weights, unit.count)
    grams: list[Tensor] = []

    def losses(keep: Tensor) -> Tensor:
        if not grams:
            for part, like in zip(x.split(_CHUNK), weights.split(_CHUNK), strict=True):
                outputs = torch.stack([alone(experts, e, part, like).float() for e in range(unit.count)], dim=1)
                grams.append(outputs @ outputs.mT)
        found = torch.full((unit.count,), float("inf"), dtype=torch.float64)
        for expert in keep.nonzero()[:, 0].tolist():
            left = keep.clone()
            left[expert] = False
            change = dense - _spread(*restricted(model, unit, left).sends(x), unit.count)
            parts = zip(change.split(_CHUNK), grams, strict=True)
            found[expert] = sum(float(torch.einsum("te,tef,tf->", d, G, d)) for d, G in parts)
        return found

    return losses


def some(calls: list[Routed], count: int) -> Routed:
    """At most `count` of the tokens, at even distances."""
    step, offset, taken = -(-sum(len(x) for x, _, _ in calls) // count), 0, list[Routed]()
    for x, chosen, weights in calls:
        first = -offset % step
        taken.append((x[first::step], chosen[first::step], weights[first::step]))
        offset += len(x)
    x, chosen, weights = (torch.cat(parts) for parts in zip(*taken, strict=True))
    return x, chosen, weights


def _spread(chosen: Tensor, weights: Tensor, count: int) -> Tensor:
    """Router weights by expert, float32 [tokens, experts]."""
    return torch.zeros(len(chosen), count, device=chosen.device).scatter_add_(1, chosen, weights.float())
