"""A copy of a model whose parameters, and with them gradients and optimizer states, are sharded over the processes.

The copy computes on the device with torch's FSDP2: a block's parameters are put together from all processes when it is
called, and freed afterwards. The model itself stays whole, in the memory of the processor, and gets the trained values
back at the end; so it is written, counted and compared as in one process. All processes must call the copy equally
often.

In memory of the device, by process: what one block needs, and the rest divided by the number of processes.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from billhook.architectures.stacks import blocks_of
from billhook.distributed.collectives import world
from billhook.distributed.torchrun import rank
from billhook.recovery.trained import Kept


def sharded(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """A copy of a model in the memory of the processor, sharded over the processes on their devices of this type."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # whose parameters are copied block by block
    mesh = init_device_mesh(torch.device(device).type, (world(),))
    for part in (*blocks_of(twin).values(), twin):
        _copy_parameters(part)
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # of the root too, whose values change between calls
    return twin


def kept_shards(kept: Sequence[Kept], twin: PreTrainedModel) -> list[Kept]:
    """What is trained of a whole model, in this process's shards of its sharded copy."""
    return [Kept(k.name, twin.get_parameter(k.name), k.stored, _shard_of(k.mask).to(twin.device), k.size) for k in kept]


@torch.no_grad()
def gather_(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Give a whole model the values of its sharded copy."""
    for name, parameter in twin.named_parameters():
        assert isinstance(parameter, DTensor)
        model.get_parameter(name).copy_(parameter.full_tensor())


def _copy_parameters(module: nn.Module) -> None:
    """Replace the parameters of a module that are not sharded by copies; tied ones stay tied."""
    copies: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        for name, p in list(inner.named_parameters(recurse=False)):
            if not isinstance(p, DTensor):
                own = copies.setdefault(id(p), nn.Parameter(p.detach().clone(), p.requires_grad))
                setattr(inner, name, own)


def _shard_of(whole: Tensor) -> Tensor:
    """This process's rows of a tensor, divided as FSDP2 divides parameters."""
    chunks = whole.chunk(world())
    return chunks[rank()].clone() if rank() < len(chunks) else whole[:0]
