"""Load a packed directory as a transformers model whose sparse linear layers stay packed, memory-mapped from the file.

`transformers` renames, fuses and ties weights while it loads. So it is given placeholders, a single zero expanded to
the shape of each packed tensor: the linear layer whose weight is a placeholder is replaced by a SparseLinear. Packed
tensors that are used in another way (fused experts, embeddings) are expanded, and the model is loaded again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from billhook.ambient import pinned
from billhook.architectures.layers import is_plain_linear, is_transposed
from billhook.architectures.sources import resolve
from billhook.errors import BillhookError
from billhook.packed.expand import PackedTensor, packed_tensor, stored_tensor
from billhook.packed.format import Packed, open_packed
from billhook.runtime.layout import PADDING
from billhook.runtime.linear import SparseLinear
from billhook.runtime.tuning import tune_
from billhook.store import checkpoint
from billhook.store.checkpoint import loading
from billhook.store.compute import chosen_device, chosen_dtype
from billhook.store.layout import is_packed
from billhook.tasks.opening import load_model, task_of_config

_READ = ("config.json", "generation_config.json")


@pinned
def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    tune: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> PreTrainedModel:
    """Load a packed, quantized or ordinary model directory (or hub name) in evaluation mode, after checking it.

    "auto" is the GPU if there is one, and there the checkpoint's dtype; on a processor it is float32. Packed values
    keep their dtype where no precision would be lost. With `tune`, the
    fastest kernel for each layer is measured or read from a cache (`billhook.runtime.tuning`); kernels differ in the
    last bits of their results. `note` is called with a message about tensors that were expanded. A packed model is for
    inference and cannot be written with save_pretrained.

    Raises BillhookError for a directory that differs from what was packed, and what `load_model` raises.
    """
    path = resolve(model)
    if not is_packed(path):
        return load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quantized=True)
    config = checkpoint.read_config(path)
    task = task_of_config(path, config)
    checkpoint.check_trusted(path, config, task.auto_class, trust_remote_code)
    packed = open_packed(path)
    packed.check(_READ.__contains__)
    checkpoint.check_depth(path, config, sum(len(shard.entries) for shard in packed.shards))
    device = chosen_device(device)
    dtype = chosen_dtype(dtype, device, path)
    loaded = _build(packed, task.auto_class, dtype, trust_remote_code, note)
    loaded.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    with checkpoint.on_device(device):
        loaded = loaded.eval().to(device)
    if tune:
        tune_(loaded)
    return loaded


def _refuse_to_save(*arguments: Any, **options: Any) -> NoReturn:
    advice = "copy its directory, or make a dense one with billhook unpack"
    raise BillhookError(f"A packed model cannot be written with save_pretrained: {advice}.")


def _build(
    packed: Packed, auto_class: str, dtype: torch.dtype, trust_remote_code: bool, note: Callable[[str], None]
) -> PreTrainedModel:
    """The model with SparseLinear layers on the CPU."""
    with loading(packed.path):
        config = AutoConfig.from_pretrained(packed.path, local_files_only=True, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            kind = type(getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code))
    tensors: dict[str, PackedTensor] = {}
    dense: dict[str, Tensor] = {}
    for shard in packed.shards:
        for name in shard.entries:
            if name in packed.matrices:
                tensors[name] = packed_tensor(packed, shard, name)
                _ = tensors[name].starts  # raises an error unless bitmask and values agree
            else:
                dense[name] = stored_tensor(shard, name)
    layers = {name for name, tensor in tensors.items() if len(tensor.facts.shape) == 2}
    while True:
        placeholders = {name: torch.zeros(1, dtype=dtype).expand(tensors[name].facts.shape) for name in layers}
        expanded = {name: tensor.dense() for name, tensor in tensors.items() if name not in layers}
        model = _instantiate(packed.path, kind, config, dtype, {**dense, **expanded, **placeholders})
        found = _find_layers(model, tensors, placeholders)
        if len(found) == len(layers):
            break
        layers = set(found)
        del model
    for name, module in found.items():
        model.set_submodule(module, _sparse(tensors[name], model.get_submodule(module), dtype))
    if expanded:
        which = f"{len(expanded)} packed tensors ({min(expanded)}, ...)"
        note(f"{which} are not the weight of a linear layer in memory and were expanded.")
    return model


def _instantiate(
    path: Path, kind: Any, config: Any, dtype: torch.dtype, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    with loading(path):
        model = checkpoint.from_pretrained(kind, path, None, dtype=dtype, config=config, state_dict=dict(state))
        if (path / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    model.name_or_path = model.config.name_or_path = str(path)
    return model


def _find_layers(
    model: PreTrainedModel, tensors: Mapping[str, PackedTensor], placeholders: Mapping[str, Tensor]
) -> dict[str, str]:
    """The linear module whose weight is each placeholder, without placeholders that are used in another way."""
    names = {tensor.data_ptr(): name for name, tensor in placeholders.items()}
    found: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            name = names.get(value.data_ptr())
            if name is not None:
                facts = tensors[name].facts
                whole = parameter == "weight" and is_plain_linear(module) and value.shape == facts.shape
                fits = whole and is_transposed(module) == facts.transposed
                found.setdefault(name, []).append(module_name if fits else "")
    return {name: places[0] for name, places in found.items() if len(places) == 1 and places[0]}


def _sparse(tensor: PackedTensor, module: nn.Module, dtype: torch.dtype) -> SparseLinear:
    """The layer that replaces `module`; values are converted to `dtype` unless that is float32."""
    values = tensor.values
    if tensor.scales is None and dtype != torch.float32 and values.dtype != dtype:
        values = nn.functional.pad(values[: int(tensor.starts[-1])].to(dtype), (0, PADDING // dtype.itemsize))
    bias = getattr(module, "bias", None)
    columns, scales = tensor.facts.columns, tensor.scales
    return SparseLinear(tensor.bitmask, values, tensor.starts, columns, bias=bias, scales=scales, dtype=dtype)
