"""Masks by parameter name: which prunable weights of a model are zero, and keeping them zero during training.

Two things bring a pruned weight back: its gradient, and an optimizer that changes weights without a gradient of their
own (momentum from before the mask, Muon's orthogonalization). So both are undone: gradients are masked as soon as they
are accumulated, which makes clipping and second moments right, and weights are projected after each optimizer step.

Parameters are looked up by name whenever they are needed: FSDP2 and other wrappers replace parameter objects. Masks of
a sharded parameter (DTensor) are those of this process's shard, so no process sends anything to another.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from billhook.architectures.layers import find_layers
from billhook.distributed.collectives import world
from billhook.distributed.shards import local
from billhook.errors import BillhookError


def find_masks(model: nn.Module) -> dict[str, Tensor]:
    """Where the prunable weights of a model are not zero, by parameter name: bool, True = kept.

    `model` may be wrapped (DDP, FSDP2, torch.compile, peft); names are those of the model inside. A mask has the shape
    of the stored parameter, which may be transposed (Conv1D) or hold several experts, or of this process's shard of it.
    Raises BillhookError as `find_layers` does.
    """
    inner = unwrapped(model)
    adapters = [name for name, module in inner.named_modules() if hasattr(module, "base_layer")]
    names = dict[str, None]()
    for layer in find_layers(inner, convolutions=True, outside=True):
        if not any(layer.name.startswith(f"{name}.") and layer.name != f"{name}.base_layer" for name in adapters):
            names[layer.stored_name] = None
    return {name: local(inner.get_parameter(name)).detach() != 0 for name in names}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model inside DDP, torch.compile and peft; raises BillhookError if it is not one of transformers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # peft
            inner = inner.get_base_model()
        elif hasattr(inner, "_orig_mod") or hasattr(inner, "module"):  # torch.compile, DDP
            inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
        else:
            raise BillhookError(f"The model must be a transformers PreTrainedModel, got {type(inner).__name__}.")
    return inner


@torch.no_grad()
def project_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set removed weights to zero, in place."""
    for parameter, mask in _parameters(model, masks):
        local(parameter).detach().masked_fill_(~mask, 0)


@torch.no_grad()
def count_returned(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many removed weights are not zero (in this process's shard), by parameter name, where there are any."""
    inner = unwrapped(model)
    counts = {
        name: int((local(inner.get_parameter(name))[~mask.to(inner.get_parameter(name).device)] != 0).sum())
        for name, mask in masks.items()
    }
    return {name: count for name, count in counts.items() if count}


@contextmanager
def keep_masks(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep the zeros of a model's prunable weights zero in a training loop of one's own; yield the masks by name.

        with billhook.keep_masks(model):
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Inside, gradients are masked when they are accumulated, and after each step of any `torch.optim.Optimizer` weights
    are projected. Wrap the model (`fully_shard`, DDP) before. Raises BillhookError if no trained weight is zero.
    """
    masks = trained_masks(model)
    with masked_gradients(model, masks):
        handle = register_optimizer_step_post_hook(lambda *_: project_(model, masks))
        try:
            yield masks
        finally:
            handle.remove()


@contextmanager
def masked_gradients(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Mask the gradients of a model's parameters as soon as they are accumulated, while the `with` block lasts."""

    def hook(mask: Tensor) -> Any:
        def mask_(parameter: Tensor) -> None:
            if parameter.grad is not None:
                local(parameter.grad).masked_fill_(~mask, 0)

        return mask_

    handles = [
        parameter.register_post_accumulate_grad_hook(hook(mask))
        for parameter, mask in _parameters(model, masks)
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trained_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of the weights that are trained and hold zeros; raises BillhookError if there is none."""
    inner = unwrapped(model)
    sparse = {name: mask for name, mask in find_masks(model).items() if not mask.all()}
    if not sparse and world() == 1:  # a shard may have none
        raise BillhookError(f"No prunable weight of {type(inner).__name__} is zero: there is no mask to keep.")
    trained = {name: mask for name, mask in sparse.items() if inner.get_parameter(name).requires_grad}
    if sparse and not trained:
        raise BillhookError(
            "No weight that holds zeros is trained, so there is nothing to keep. LoRA adapters lose the zeros when "
            "they are merged, except those of billhook.masked_lora(config)."
        )
    return trained


def _parameters(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters as they are now, with their masks on the same device."""
    inner = unwrapped(model)
    for name, mask in masks.items():
        parameter = inner.get_parameter(name)
        if (shape := local(parameter).shape) != mask.shape:
            raise BillhookError(
                f"{name} has the shape {list(shape)} now, its mask {list(mask.shape)}: the model was wrapped or "
                "changed after its masks were made. Wrap it first."
            )
        yield parameter, mask.to(parameter.device)
