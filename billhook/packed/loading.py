"""A packed directory as a transformers model whose sparse linear layers stay packed, mapped from the file.

`transformers` renames, fuses and ties weights while it loads. So it is given stand-ins for the packed tensors, a single
number seen as a matrix of their shape, and where a stand-in comes out as the weight of a linear layer, that layer
becomes a SparseLinear with the packed tensors. Packed tensors that do not come out whole in one linear layer (experts
that are fused, embeddings) are expanded.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError
from billhook.packed.format import Packed, open_packed
from billhook.packed.matrices import FLOATS, Expandable, expandable, mapped
from billhook.runtime.linear import SparseLinear
from billhook.runtime.tuning import tune_
from billhook.store.checkpoint import (
    check_complete,
    check_trusted,
    known_dtype,
    loading,
    on_device,
    read_config,
    resolve,
)
from billhook.store.layout import is_packed
from billhook.tasks.opening import load_model, task_of_config

_LINEAR = frozenset({"Linear", "FalconLinear"})  # classes that do nothing but x Wᵀ + bias
_READ = ("config.json", "generation_config.json")


def load(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    tune: bool = True,
    note: Callable[[str], None] = lambda text: None,
) -> PreTrainedModel:
    """Load a packed or an ordinary model directory (or hub name) in evaluation mode, after checking all of it.

    `dtype` "auto" is the checkpoint's own; packed values keep theirs where no precision would be lost. Unless `tune` is
    False, the fastest way to multiply is measured for each layer, or recalled from an earlier measurement
    (`billhook.runtime.tuning`); ways differ in the last bits of their results. `note` is told what was expanded.

    A packed model is for inference, and cannot be written with save_pretrained. Raises BillhookError where anything in
    the directory is not as it was packed, and what `load_model` raises.
    """
    path = resolve(model)
    if not is_packed(path):
        return load_model(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    config = read_config(path)
    task = task_of_config(path, config)
    check_trusted(path, config, task.auto_class, trust_remote_code)
    packed = open_packed(path)
    for problem in (*packed.checked_files(lambda name: name in _READ), *packed.checked_tensors()):
        raise BillhookError(f"{path}: {problem}")
    loaded = _build(packed, task.auto_class, known_dtype(dtype), trust_remote_code, note)
    loaded.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
    with on_device(device):
        loaded = loaded.eval().to(device)
    if tune:
        tune_(loaded)
    return loaded


def _refuse_to_save(*arguments: Any, **options: Any) -> NoReturn:
    raise BillhookError(
        "A packed model cannot be written with save_pretrained: copy its directory, or make a dense one by "
        "billhook unpack."
    )


def _build(
    packed: Packed, auto_class: str, dtype: str | torch.dtype, trust_remote_code: bool, note: Callable[[str], None]
) -> PreTrainedModel:
    """The model with SparseLinear layers on the CPU."""
    with loading(packed.path):
        config = AutoConfig.from_pretrained(packed.path, local_files_only=True, trust_remote_code=trust_remote_code)
        chosen = _dtype(packed, config, dtype)
        with torch.device("meta"):
            kind = type(getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code))
    tensors = {
        name: expandable(packed, shard, name)
        for shard in packed.shards
        for name in shard.entries
        if name in packed.matrices
    }
    for tensor in tensors.values():
        _ = tensor.starts  # counts the bits, which proves that bitmask and values agree
    dense = {
        name: mapped(shard, name) for shard in packed.shards for name in shard.entries if name not in packed.matrices
    }
    stand_ins = {
        name: torch.zeros(1, dtype=chosen).expand(tensor.facts.shape)
        for name, tensor in tensors.items()
        if len(tensor.facts.shape) == 2 and ".experts." not in name
    }
    while True:
        expanded = {name: tensor.dense() for name, tensor in tensors.items() if name not in stand_ins}
        model = _instantiate(packed.path, kind, config, chosen, {**dense, **expanded, **stand_ins})
        found = _places(model, tensors, stand_ins)
        if len(found) == len(stand_ins):
            break
        stand_ins = {
            name: stand_ins[name] for name in found
        }  # the others went somewhere else: load again with their values
    for name, module in found.items():
        model.set_submodule(module, _sparse(tensors[name], model.get_submodule(module), chosen))
    if expanded:
        note(
            f"{len(expanded)} packed tensors are no linear layer of their own in memory and were expanded "
            f"({min(expanded)}, ...)."
        )
    return model


def _dtype(packed: Packed, config: Any, asked: str | torch.dtype) -> torch.dtype:
    """The dtype to compute in: as asked, as the configuration says, or that of the packed tensors."""
    if isinstance(asked, torch.dtype):
        return asked
    configured = getattr(config, "dtype", None)
    return configured if isinstance(configured, torch.dtype) else FLOATS[next(iter(packed.matrices.values())).dtype]


def _instantiate(
    path: Path, kind: Any, config: Any, dtype: torch.dtype, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    with loading(path):
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            dtype=dtype,
            experts_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`, by name
        )
        if (path / "generation_config.json").is_file() and model.can_generate():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    check_complete(path, info)
    model.name_or_path = model.config.name_or_path = str(path)
    return model


def _places(
    model: PreTrainedModel, tensors: Mapping[str, Expandable], stand_ins: Mapping[str, Tensor]
) -> dict[str, str]:
    """The linear module that holds each stand-in as its weight, by name; those that are used in another way are left
    out."""
    names = {tensor.data_ptr(): name for name, tensor in stand_ins.items()}
    found: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            name = names.get(value.data_ptr())
            if name is not None:
                facts = tensors[name].facts
                turned = isinstance(module, Conv1D)
                whole = (
                    parameter == "weight"
                    and (turned or type(module).__name__ in _LINEAR)
                    and turned == facts.transposed
                )
                found.setdefault(name, []).append(module_name if whole and value.shape == facts.shape else "")
    return {name: places[0] for name, places in found.items() if len(places) == 1 and places[0]}


def _sparse(tensor: Expandable, module: nn.Module, dtype: torch.dtype) -> SparseLinear:
    """The layer that takes the place of `module`; values in a wider or the same dtype as computed in stay as they are
    on disk."""
    values = tensor.values
    if tensor.scales is None and dtype != torch.float32 and values.dtype != dtype:
        values = values.to(dtype)
    bias = getattr(module, "bias", None)
    return SparseLinear.from_packed(
        tensor.bitmask, values, tensor.starts, tensor.facts.columns, tensor.facts.rows, bias=bias, scales=tensor.scales
    )
