"""Regional gradients: how the size of a block's own outputs depends on each of its weights; no gradient of the model's
loss.

Of each calibration sequence the gradient of ||block(X)||_2 by the block's weights, X being the inputs in the dense
model, and of these the root mean square over sequences (Wanda++, arXiv:2503.04992). One block with its gradients is in
memory at a time.
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
from billhook.engine.walk import Block, walk


def regional_gradients(
    model: PreTrainedModel, sequences: Sequence[Batch], layers: Sequence[Layer], resources: Resources = IN_MEMORY
) -> Iterator[tuple[str, Tensor]]:
    """Yield layer names and root mean squares, float32 [out, in], block by block; a sequence is a batch of one row."""
    wanted = {layer.name for layer in layers}
    for block in walk(model, sequences, (), read_only=True, resources=resources):
        inside = [layer for layer in block.layers if layer.name in wanted]
        if inside:
            yield from _of_block(block, inside)


def _of_block(block: Block, layers: Sequence[Layer]) -> Iterator[tuple[str, Tensor]]:
    parameters = list({id(p): p for p in (getattr(layer.module, layer.parameter) for layer in layers)}.values())
    flags = [p.requires_grad for p in parameters]
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        for inputs, call in zip(block.inputs, block.calls, strict=True):
            with torch.enable_grad():
                size = run_block(block.module, inputs.detach(), call).float().norm()
            found = torch.autograd.grad(size, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:  # an expert that no token was sent to
                    total += gradient.float().square()
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    sequences = int(all_reduce_(torch.tensor(len(block.inputs))))
    by_id = {id(p): (all_reduce_(total) / sequences).sqrt() for p, total in zip(parameters, sums, strict=True)}
    for layer in layers:
        value = by_id[id(getattr(layer.module, layer.parameter))]
        value = value if layer.expert is None else value[layer.expert]
        yield layer.name, (value.T if layer.transposed else value).contiguous()
