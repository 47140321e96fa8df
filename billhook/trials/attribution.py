"""How much of a pruned model's KL divergence from the dense model is due to each layer, by one backward pass.

D is the divergence on a text as a function of the weights, W_l a layer's dense weight and V_l its pruned one:

    share_l = 1/2 <dD / dV_l, V_l - W_l>

D is zero, its minimum, at the dense weights. Where it is quadratic in between, the shares add up to D (Euler's theorem
for homogeneous functions), and each is the cost of the layer's own error plus half of its interactions with the other
layers; on small models at 50 to 60 % sparsity they add up to 1.1 to 1.3 times D. The derivative of D by the size of the
layer's error is exact at any distance, so small changes of the budget are ranked correctly. A share is a difference of
small numbers and can come out too small or negative: none is set below `FLOOR` times the mean share.

Cost: a forward and a backward pass of the text. In memory: the gradient of one weight, and of one batch
(`billhook.evaluation.batching`) the logits, their gradient and the activations. Where the activations are large, only
the blocks' inputs are kept, and each block's forward pass is repeated in the backward pass.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.layers import Layer, observable_experts
from billhook.architectures.stacks import blocks_of
from billhook.engine.batch import Batch, row_length, split_rows
from billhook.engine.capture import stubbed
from billhook.engine.restore import differentiable
from billhook.errors import JobError
from billhook.evaluation.predicting import predicted, rows_at_once
from billhook.evaluation.scoring import Scoring

FLOOR = 0.05
_BYTES = 1 << 29  # of outputs of the pruned layers for one batch, beyond which activations are recomputed


def attribute(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    dense: Mapping[str, Tensor],
    heldout: Batch,
    scoring: Scoring,
    gradients: Mapping[int, Callable[[Tensor], Tensor]],
) -> dict[str, float]:
    """Each layer's share by name, in nats a token.

    `dense` are the dense weights [out, in] by layer name; `scoring` gives the scored outputs of a batch and their
    labels (of a task); `gradients[row](outputs)` returns the gradient of the divergence of one row, summed over
    tokens, with respect to its scored outputs [tokens, vocabulary]. Raises JobError for a gradient that is not finite,
    naming the layer.
    """
    sums = {layer.name: 0.0 for layer in layers}

    def add(layer: Layer, gradient: Tensor) -> None:
        change = layer.weight.float() - dense[layer.name].float()
        sums[layer.name] += float((gradient.float() * change).sum(dtype=torch.float64))

    tokens = weight_gradients(model, layers, heldout, scoring, gradients, add)
    for name, value in sums.items():
        if not math.isfinite(value):
            raise JobError(f"The gradients of {name} hold NaN or infinity. Run in a wider type (--dtype float32).")
    shares = {name: value / (2 * tokens) for name, value in sums.items()}
    least = max(FLOOR * math.fsum(shares.values()) / len(shares), 1e-12)
    return {name: max(share, least) for name, share in shares.items()}


def weight_gradients(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    rows: Batch,
    scoring: Scoring,
    gradients: Mapping[int, Callable[[Tensor], Tensor]],
    visit: Callable[[Layer, Tensor], None],
) -> int:
    """Call `visit` with each layer and its weight's gradient [out, in], summed over the tokens of a part of `rows`.

    `scoring` and `gradients` are those of `attribute`. A gradient is freed after its visit; a layer is visited once for
    each part of the rows that is computed at once. Returns the number of scored tokens.
    """
    parameters: dict[int, tuple[nn.Parameter, list[Layer]]] = {}
    for layer in layers:
        parameter = getattr(layer.module, layer.parameter)
        parameters.setdefault(id(parameter), (parameter, []))[1].append(layer)
    length, row, tokens = row_length(model, rows), 0, 0
    size = rows_at_once(model, rows)
    outputs = size * length * sum(layer.shape[0] for layer in layers) * model.dtype.itemsize
    memory = _checkpointed(model) if outputs > _BYTES else nullcontext()
    wanted = [parameter for parameter, _ in parameters.values()]
    flags = differentiable(wanted, model.parameters())
    with flags, observable_experts(model), evaluating(model), memory, ExitStack() as hooks:
        for parameter, inside in parameters.values():
            handle = parameter.register_post_accumulate_grad_hook(_visitor(inside, visit))
            hooks.callback(handle.remove)
        for batch in split_rows(rows, size):
            with torch.enable_grad():
                pairs = predicted(model, batch, scoring)
            found = [gradients[row + i](q.detach()).to(q.dtype) for i, (q, _) in enumerate(pairs)]
            torch.autograd.backward([q for q, _ in pairs], found)
            row, tokens = row + len(pairs), tokens + sum(len(y) for _, y in pairs)
    return tokens


def _visitor(layers: Sequence[Layer], visit: Callable[[Layer, Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that visits each layer of a parameter with its part of the gradient, and frees the gradient."""

    @torch.no_grad()
    def add(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for layer in layers:
            visit(layer, layer.view(gradient))

    return add


@contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Keep only each block's inputs, and recompute its activations in the backward pass."""

    def stub(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)

    with stubbed(blocks_of(model), stub):
        yield
