"""Train a tiny model with zeros under FSDP2, with its masks kept and without, and write the whole weights:
`torchrun sharded_training.py FOLDER (trainer | loop)`."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from safetensors.torch import save_file
from sparse_models import prune_at_random
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training import Windows, train
from transformers import Trainer

import billhook


class Sharding(Trainer):
    """accelerate shards models on GPUs only, so it is told that the processes, on CPUs, have some."""

    def create_accelerator_and_postprocess(self) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


def by_trainer(folder: Path, keep: bool) -> Any:
    return train(prune_at_random(tiny.llama()), folder, "adamw_torch", keep, Sharding, fsdp=True).model


def by_loop(keep: bool) -> Any:
    """A loop of one's own, with gradients clipped; the process group is there."""
    model = prune_at_random(tiny.llama()).train()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with billhook.keep_masks(model) if keep else contextlib.nullcontext():
        for batch in Windows().ids[dist.get_rank() :: dist.get_world_size()].split(4):
            model(input_ids=batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


def whole(model: Any) -> dict[str, torch.Tensor]:
    """The parameters, all of which are sharded."""
    parameters = dict(model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    return {name: parameter.full_tensor().detach().contiguous() for name, parameter in parameters.items()}


if __name__ == "__main__":
    folder, how = Path(sys.argv[1]), sys.argv[2]
    if how == "loop":
        dist.init_process_group("gloo")
    for keep in (True, False):
        tensors = whole(by_trainer(folder, keep) if how == "trainer" else by_loop(keep))
        if dist.get_rank() == 0:
            save_file(tensors, folder / f"{'kept' if keep else 'lost'}.safetensors")
    dist.destroy_process_group()
