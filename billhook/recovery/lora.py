"""LoRA with peft on a pruned model: adapters whose product is masked, and merging them with every zero in place.

An ordinary adapter adds B A to a weight, zeros included, so merging it makes the model dense again. Registering a layer
class of one's own is an experimental part of peft, and the class is not written into the adapter's files: an adapter is
loaded with `config=masked_lora(LoraConfig.from_pretrained(directory))`; without it, it adds to the zeros too.
"""

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.architectures.layers import check_finite
from billhook.errors import BillhookError, JobError
from billhook.recovery.masks import count_returned, find_masks, unwrapped

if TYPE_CHECKING:
    from peft import LoraConfig

_INITIALIZATIONS = (True, False, "gaussian")  # others change the weights, zeros included, when an adapter is made


def masked_lora(config: "LoraConfig") -> "LoraConfig":
    """A copy of a peft `LoraConfig` with which LoRA layers mask their product, for `get_peft_model`, TRL and Axolotl.

    Raises BillhookError without peft, and for options that change zeros.
    """
    peft = require_peft()
    if not isinstance(config, peft.LoraConfig):
        raise BillhookError(f"masked_lora needs a peft LoraConfig, got {type(config).__name__}.")
    if config.init_lora_weights not in _INITIALIZATIONS:
        raise BillhookError(
            f"init_lora_weights={config.init_lora_weights!r} changes the weights, zeros included: "
            "use True or 'gaussian'."
        )
    if config.lora_bias or config.target_parameters:
        raise BillhookError("masked_lora masks linear layers: leave lora_bias and target_parameters out.")
    from billhook.recovery.masked_linear import MaskedLinear

    masked = copy.copy(config)
    masked._custom_modules = None  # not that of the given one, which a registration would change
    masked._register_custom_module({nn.Module: MaskedLinear})  # which refuses what is not linear
    return masked


def merge_masked(model: nn.Module) -> PreTrainedModel:
    """Merge masked adapters into the weights, in place, and return the model without adapters.

    Raises BillhookError, before anything changes, for a model without adapters and for adapters that are not masked,
    not finite, or on a weight that another layer has too, and JobError if a zero is lost all the same (to
    `modules_to_save`).
    """
    peft = require_peft()
    from billhook.recovery.masked_linear import MaskedLinear

    if not isinstance(model, peft.PeftModel):
        raise BillhookError(f"merge_masked needs a peft model, got {type(model).__name__}.")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    plain = [name for name, module in layers.items() if not isinstance(module, MaskedLinear)]
    if plain or not layers:
        what = f"{plain[0]} has an adapter whose product is not masked" if plain else "The model has no LoRA layer"
        raise BillhookError(f"{what}: make or load adapters with billhook.masked_lora(config).")
    shared = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if tied := [name for name, module in layers.items() if shared[id(module.get_base_layer().weight)] > 1]:
        raise BillhookError(
            f"The weight of {tied[0]} is that of another layer too, which would change: leave it out of target_modules."
        )
    masks = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): mask
        for name, mask in find_masks(model).items()
        if ".modules_to_save." not in name
    }
    check_finite(model)
    merged = unwrapped(model.merge_and_unload())
    if lost := count_returned(merged, masks):
        name, count = next(iter(lost.items()))
        raise JobError(f"{name} lost {count} of its zeros when adapters were merged: leave it out of modules_to_save.")
    return merged


def require_peft() -> Any:
    """The package peft; raises BillhookError without it."""
    try:
        import peft
    except ImportError:
        raise BillhookError("LoRA needs the package peft: pip install 'billhook[lora]'.") from None
    return peft


@torch.no_grad()
def zeros_lost_by_an_ordinary_merge(model: nn.Module) -> int:
    """How many zeros of the weights would have values after an ordinary merge of a model's masked adapters."""
    from peft.tuners.lora import Linear

    from billhook.recovery.masked_linear import MaskedLinear

    lost = 0
    for layer in model.modules():
        if isinstance(layer, MaskedLinear):
            zeros = layer.get_base_layer().weight == 0
            lost += sum(int(Linear.get_delta_weight(layer, name)[zeros].count_nonzero()) for name in layer.lora_A)
    return lost
