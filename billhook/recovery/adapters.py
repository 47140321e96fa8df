"""LoRA adapters as what is trained: put on a model's linear layers in place, and merged when the training is over.

Their product is masked (`billhook.recovery.masked_linear`), so the merged weights have every zero that they had. The
rate is that of the factors itself, not a share of their size: one of the two begins at zero.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.engine.restore import restore_
from billhook.errors import BillhookError
from billhook.recovery.lora import masked_lora, merge_masked, require_peft
from billhook.recovery.trained import Kept
from billhook.recovery.training import Recovered

RATES = (0.0005, 0.001, 0.002, 0.005)  # that race


def add_adapters_(
    model: PreTrainedModel, layers: Sequence[Layer], *, rank: int, masked: bool = True, seed: int = 0
) -> Any:
    """Put adapters of a rank on the linear layers among `layers` (not on experts and convolutions), and return peft's
    model around `model`. Their alpha is twice the rank, as usual.

    Raises BillhookError without peft and where no layer is linear.
    """
    peft = require_peft()
    names = [layer.name for layer in layers if layer.expert is None and not layer.is_convolution]
    if not names:
        raise BillhookError("None of the layers is linear, so none can have an adapter: use --tune kept+norms.")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_suffixes(model, names))
    config.fan_in_fan_out = any(layer.transposed for layer in layers)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a name that it renamed
        torch.manual_seed(seed)
        return peft.get_peft_model(model, masked_lora(config) if masked else config)


def _suffixes(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """The last parts of the names, which other programs expect, where they say the same; else the names."""
    ends = {name.rpartition(".")[2] for name in names}
    found = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if found == set(names) else names)


def factors(model: PreTrainedModel) -> list[Kept]:
    """The factors of all adapters, every entry of which is trained."""
    found = [(name, p) for name, p in model.named_parameters() if ".lora_" in name]
    return [Kept(name, p, p.dtype, torch.ones_like(p, dtype=torch.bool), size=1.0) for name, p in found]


@torch.no_grad()
def merge_(
    adapted: Any, layers: Sequence[Layer], done: Recovered, held_out: Callable[[], float], stored: torch.dtype
) -> Recovered:
    """Merge the adapters into the weights, rounded to the dtype of the files, and return the result with the held-out
    loss of the merged model. Where that is not better than before, the weights get the bits back that they had."""
    if not done.after < done.before:
        adapted.unload()
        return done
    own: dict[str, Tensor] = {layer.name: layer.weight.clone() for layer in layers}
    merge_masked(adapted)
    for layer in layers:
        layer.weight.copy_(layer.weight.to(stored))
    after = held_out()
    if after < done.before:
        return replace(done, after=after)
    restore_(layers, own)
    return replace(done, after=done.before)
