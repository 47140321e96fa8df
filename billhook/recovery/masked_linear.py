"""A LoRA layer of peft whose product of factors is masked, so that merging it keeps every zero of its weight.

    y = x (W + M ∘ (B A · alpha / r))ᵀ + b,   M = 1 where W is not 0

The merged weight is computed in each forward pass, in the dtype of W: what is trained is what merging gives, bit for
bit. As in SQFT (arXiv:2410.03750), LoSA (arXiv:2502.14816) and PERP (arXiv:2312.15230). The mask is that of the weight
as it is, so nothing is stored for it. Gradient checkpointing frees the merged weights of all but one block.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError


class MaskedLinear(Linear):
    """LoRA on a linear layer (or Conv1D) with the product masked; raises BillhookError for other layers, for experts,
    and for variants of LoRA."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        kind = type(getattr(base_layer, "base_layer", base_layer))
        if not issubclass(kind, (nn.Linear, Conv1D)):
            raise BillhookError(f"masked_lora masks linear layers, not {kind.__name__}: change target_modules.")
        if config.target_parameters:  # peft makes them of target_modules
            raise BillhookError(
                "masked_lora masks linear layers, not experts in one parameter: name others in target_modules."
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if not self._stored.is_floating_point():
            raise BillhookError("Quantized weights cannot be masked: give peft the LoraConfig without masked_lora.")
        if self.lora_variant:
            variant = type(next(iter(self.lora_variant.values()))).__name__
            raise BillhookError(f"masked_lora masks the product of plain LoRA, not of its variants ({variant}).")

    @property
    def _stored(self) -> Tensor:
        weight: Any = self.get_base_layer().weight
        return weight

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight, in the weight's layout: zero where the weight is zero."""
        return super().get_delta_weight(adapter).masked_fill(self._stored == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for `x` [..., in] with its active adapters; dropout only changes what an adapter sees."""
        if kwargs.get("adapter_names") is not None:
            raise BillhookError("Masked adapters cannot be mixed in one batch: leave adapter_names out.")
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not active:
            return super().forward(x, *args, **kwargs)
        weight, dropped = self._stored, []
        for name in active:
            delta, dropout = self.get_delta_weight(name), self.lora_dropout[name]
            if self.training and isinstance(dropout, nn.Dropout):
                delta = (delta.T if self.fan_in_fan_out else delta).to(x.dtype)
                dropped.append(linear(dropout(x), delta))
            else:
                weight = (weight + delta).to(weight.dtype)
        result: Tensor = functional_call(self.get_base_layer(), {"weight": weight}, (x, *args), kwargs)
        return torch.stack([result, *dropped]).sum(0) if dropped else result
