"""What each layer's pruning costs the model, at any sparsity, with the criterion that will do it: the curve behind `--allocator auto`.

Of each layer, with the dense model's inputs, the criterion is run at three sparsities (`TRIED`); e(s) is the squared change of the layer's
output relative to its square, ln e linear in s between them and on to e(1) = 1. How much the model minds is measured once a layer: with
this layer alone pruned to `MIDDLE`, the divergence KL of its predictions from the dense model's on the last `WINDOWS` windows. The curve is

    loss(s) = KL(MIDDLE) * e(s) / e(MIDDLE)      in nats a token, at s = 0, 1 / STEPS, ..., 1,   loss(0) = 0

which a small change of outputs obeys, both being quadratic in it. Cost: the criterion three times, one pass of the text through the
dense model, and a few windows through the model for each layer. It does not know how layers pruned together interact.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.arch import Layer
from billhook.criteria import CRITERIA
from billhook.criteria.magnitude import magnitude
from billhook.divergence import divergence
from billhook.errors import BillhookError
from billhook.masks import Select
from billhook.metrics import fact
from billhook.registry import method
from billhook.stats import STATISTICS, LayerStats
from billhook.walk import evaluating, walk

TRIED = (0.4, 0.6, 0.8)
MIDDLE = 0.6
STEPS = 40
WINDOWS = 4
CHEAPER: dict[str, dict[str, object]] = {"admm": {"steps": 3}}  # options that cost less
_LEAST = 1e-9


@method(paper=fact("error_curve").paper)
@torch.no_grad()
def error_curve(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Tensor], *, criterion: str = "admm"
) -> dict[str, list[float]]:
    """loss(k / STEPS) for k = 0 to STEPS, in nats a token, by layer name; the model's weights are as before afterwards.

    `batches` are token ids [batch, length] int64. Raises BillhookError for a criterion that reads gradients, or an unknown one.
    """
    options = CRITERIA.configure(criterion, CHEAPER.get(criterion, {}))
    needs = CRITERIA.needs(criterion, options)
    if not set(needs) <= set(STATISTICS):
        raise BillhookError(f"error_curve:{criterion}: this criterion reads gradients; curves are made with others, such as admm or wanda.")
    ids = torch.cat(list(batches))[-WINDOWS:].to(model.device)
    dense = _logits(model, ids)
    wanted, curves = {layer.name for layer in layers}, {}
    statistics = tuple(dict.fromkeys((*needs, "input_norm")))
    for block in walk(model, batches, statistics, dense=True):
        for layer in block.layers:
            if layer.name in wanted:
                errors, pruned = _errors(layer, block.stats[layer.name], criterion, options)
                before = layer.weight.clone()
                layer.weight.copy_(pruned)
                kl = _divergence(_logits(model, ids), dense)
                layer.weight.copy_(before)
                curves[layer.name] = _curve(errors, kl)
    return curves


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with evaluating(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _divergence(logits: Tensor, dense: Tensor) -> float:
    windows = [divergence(one[None], other[None])[0] for one, other in zip(logits, dense, strict=True)]
    return max(math.fsum(kl for window in windows for kl in window) / len(windows), 0.0)


def _errors(layer: Layer, stats: LayerStats, criterion: str, options: dict[str, object]) -> tuple[list[float], Tensor]:
    """The relative squared error of the layer's output at the sparsities tried, and its weight at `MIDDLE`."""
    W = layer.weight.float()
    errors, middle = [], W
    for sparsity in TRIED:
        function = magnitude if stats.tokens == 0 else CRITERIA.get(criterion)
        select = Select(layer.shape, sparsity, round(sparsity * W.numel()), None, CRITERIA.group(criterion))
        V = function(W, stats, select, **({} if stats.tokens == 0 else options))
        errors.append(min(max(_energy(W - V, stats) / max(_energy(W, stats), 1e-30), _LEAST), 1.0))
        middle = V if sparsity == MIDDLE else middle
    return errors, middle


def _energy(W: Tensor, stats: LayerStats) -> float:
    """The summed squares of the layer's outputs, of uncorrelated inputs where only their norms are known."""
    if stats.gram is not None:
        return float(((W @ stats.gram) * W).sum(dtype=torch.float64))
    norm = stats.input_norm if stats.input_norm is not None and stats.tokens else torch.ones(W.shape[1], device=W.device)
    return float((W * norm).square().sum(dtype=torch.float64))


def _curve(errors: Sequence[float], kl: float) -> list[float]:
    """The loss at even steps from the errors at `TRIED`, never falling."""
    points = [*zip(TRIED, map(math.log, errors), strict=True), (1.0, 0.0)]
    scale = kl / errors[TRIED.index(MIDDLE)]
    losses = [0.0]
    for k in range(1, STEPS + 1):
        s = k / STEPS
        i = min(max(sum(s > at for at, _ in points) - 1, 0), len(points) - 2)
        (a, x), (b, y) = points[i], points[i + 1]
        losses.append(max(losses[-1], scale * math.exp(x + (y - x) * (s - a) / (b - a))))
    return losses
