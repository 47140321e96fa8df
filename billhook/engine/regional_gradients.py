"""Regional gradients (Wanda++, arXiv:2503.04992): gradients of the norm of a block's own outputs by its weights.

The statistic is the root mean square, over calibration sequences, of the gradient of ||block(X)||_2, X being the inputs
of the block in the dense model. One block with its gradients is in memory at a time.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import all_reduce_
from billhook.engine.batch import Batch
from billhook.engine.replay import run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.restore import differentiable
from billhook.engine.walk import Block, walk


def regional_gradients(
    model: PreTrainedModel, sequences: Sequence[Batch], layers: Sequence[Layer], resources: Resources = IN_MEMORY
) -> Iterator[tuple[str, Tensor]]:
    """Yield layer names and root mean squares, float32 [out, in], block by block; a sequence is a batch of one row."""
    for block in walk(model, sequences, (), layers=layers, read_only=True, resources=resources):
        if block.layers:
            yield from _of_block(block, block.layers)


def _of_block(block: Block, layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
    parameters = list({id(layer.stored): layer.stored for layer in layers}.values())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with differentiable(parameters):
        for inputs, call in zip(block.inputs, block.calls, strict=True):
            with torch.enable_grad():
                size = run_block(block.module, inputs.detach(), call).float().norm()
            found = torch.autograd.grad(size, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:  # None for an expert that received no token
                    total += gradient.float().square()
    sequences = int(all_reduce_(torch.tensor(len(block.inputs))))
    by_id = {id(p): (all_reduce_(total) / sequences).sqrt() for p, total in zip(parameters, sums, strict=True)}
    for layer in layers:
        yield layer.name, layer.view(by_id[id(layer.stored)]).contiguous()
