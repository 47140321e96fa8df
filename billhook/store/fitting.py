"""Whether the tensors of files fit a model: names and shapes, compared on the meta device before a value is read."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from billhook.errors import BillhookError
from billhook.store.files import untrusted
from billhook.store.shards import Entry, Shard, lacks_metadata, weights_index
from billhook.store.tensor_bytes import DTYPES, read_tensor

_COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # dtypes in which a model can be built
# last name components of buffers that earlier versions of transformers saved, of scales of a quantized cache, of what
# profilers count, and of the state of other kinds of modules
_BUFFERS = frozenset({"masked_bias", "inv_freq", "position_ids", "cos_cached", "sin_cached", "k_scale", "v_scale"})
_BUFFERS |= {"original_inv_freq", "total_ops", "total_params", "_extra_state"}


class Stored:
    """A tensor in a file; `transformers` uses it like a tensor, and gets the values unless it is `lazy`."""

    def __init__(self, path: Path, entry: Entry, lazy: bool) -> None:
        if entry.dtype not in DTYPES:
            raise BillhookError(f"{path}: {entry.name} has an unsupported type, {entry.dtype}: convert the model.")
        self.path, self.entry, self.lazy = path, entry, lazy
        self.dtype, self.shape = DTYPES[entry.dtype], entry.shape

    def is_floating_point(self) -> bool:
        """Whether the dtype is a floating-point type."""
        return self.dtype.is_floating_point

    def __getitem__(self, everything: Any) -> "Tensor | Stored":
        return self if self.lazy else self.read()

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the same shape without values."""
        return torch.empty(self.entry.shape, dtype=dtype or self.dtype, device="meta")

    def read(self) -> Tensor:
        """The values, in the dtype on disk; raises Interrupted when they cannot be read."""
        return read_tensor(self.path, self.entry)


def stored_tensors(shards: Sequence[Shard], outside: Collection[str] = ()) -> dict[str, Stored]:
    """The tensors of files by name; those named in `outside` are not lazy."""
    return {x.name: Stored(shard.path, x, x.name not in outside) for shard in shards for x in shard.entries.values()}


def empty_model(
    path: Path, shards: Sequence[Shard], auto_class: str, trust_remote_code: bool
) -> tuple[Any, PreTrainedModel]:
    """The configuration of a directory with the files `shards`, and its model on the meta device, without values."""
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    _check_generation(path / "generation_config.json")
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None and getattr(part, "dtype", None) not in _COMPUTED:  # such as that of codes
            part.dtype = None
    kind: Any = getattr(transformers, auto_class)
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
        if options := pooling(type(model), stored_tensors(shards)):
            model = kind.from_config(config, trust_remote_code=trust_remote_code, **options)
        return config, model


def _check_generation(file: Path) -> None:
    """Raise BillhookError for a generation configuration with which `transformers` would not open the output; one that
    is no JSON is ignored there."""
    if file.is_file():
        with untrusted(f"transformers cannot load {file}", "Repair or remove it."), suppress(OSError):
            transformers.GenerationConfig.from_pretrained(file.parent, local_files_only=True)


def hidden_weights(path: Path, model: PreTrainedModel, shards: Sequence[Shard]) -> dict[str, Any]:
    """Arguments of `from_pretrained` where a file beside whole weights keeps `transformers` from reading them: the
    configuration of an adapter that was merged, or an index without `metadata`."""
    index = weights_index(path)
    if not (path / "adapter_config.json").is_file() and (index is None or not lacks_metadata(index)):
        return {}
    return {"config": model.config, "state_dict": stored_tensors(shards, stored_tensors(shards))}


def check_fits(path: Path, model: PreTrainedModel, shards: Sequence[Shard]) -> None:
    """Raise BillhookError unless the files fill `model`, which is on the meta device and stays there, exactly."""
    mapping: Any = get_model_conversion_mapping(model)
    options = LoadStateDictConfig(weight_mapping=mapping, ignore_mismatched_sizes=True)
    stored = stored_tensors(shards)
    _check_types(path, model, stored)
    info, _ = convert_and_load_state_dict_in_model(model, stored, options)
    model.mark_tied_weights_as_initialized(info)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    if info.missing_keys and (prefix := _common_prefix(model, stored)):
        wrapper = "a wrapper such as torch.compile or DataParallel writes it"
        advice = "save the model inside the wrapper, or take the prefix off the names"
        raise BillhookError(f"All tensors of {path} have the prefix {prefix!r} ({wrapper}): {advice}.")
    if info.missing_keys and (part := _inserted_part(model, stored)):
        wrapper = "a wrapper of modules, such as torch.compile or checkpointing of activations, writes it"
        advice = "save the modules inside the wrapper, or take it out of the names"
        raise BillhookError(f"Names of tensors of {path} have the part {part!r} ({wrapper}): {advice}.")
    check_complete(path, info.to_dict(), model, empty(stored))


def empty(tensors: Mapping[str, Stored | Tensor]) -> set[str]:
    """The names of the tensors without values."""
    return {name for name, tensor in tensors.items() if 0 in tensor.shape}


def pooling(kind: type, names: Collection[str]) -> dict[str, bool]:
    """Options for a model of class `kind`: without its pooler where the files, with tensors `names`, have none.

    Checkpoints of models with a head have none. The score is then that of models without a pooler.
    """
    optional = "add_pooling_layer" in inspect.signature(kind).parameters
    stored = any("pooler" in name.split(".") for name in names)
    return {"add_pooling_layer": False} if optional and not stored else {}


def _common_prefix(model: PreTrainedModel, names: Collection[str]) -> str | None:
    """What all `names` begin with, where names in the model are left without it; None if there is no such prefix."""
    known, parts = model.state_dict().keys(), min(names, default="").split(".")
    if known & set(names):
        return None
    for prefix in (".".join(parts[:end]) + "." for end in range(1, len(parts))):
        if all(x.startswith(prefix) for x in names) and any(x.removeprefix(prefix) in known for x in names):
            return prefix
    return None


def _inserted_part(model: PreTrainedModel, names: Collection[str]) -> str | None:
    """A part of `names`, between dots, without which all names that have it are those of the model; else None."""
    known = model.state_dict().keys()
    strange = {part for name in names for part in name.split(".")} - {
        part for name in known for part in name.split(".")
    }
    for part in sorted(strange):
        without = [[x for x in name.split(".") if x != part] for name in names if part in name.split(".")]
        if all(".".join(parts) in known for parts in without):
            return part
    return None


def _check_types(path: Path, model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
    """Raise BillhookError for integers in the place of a matrix of the model: they are the codes of a quantized one."""
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for name, tensor in model.state_dict().items():
        kinds[tensor.is_floating_point()].add(name.rpartition(".")[2])
    for name, found in stored.items():
        last = name.rpartition(".")[2]
        if found.is_floating_point() or len(found.shape) < 2 or is_buffer(name):
            continue
        if last in kinds[True] - kinds[False]:
            codes = "which are codes of a quantized model without their configuration, or a mask"
            raise BillhookError(f"{path}: {name} holds {found.entry.dtype}, {codes}: start from the original weights.")


def check_complete(
    path: Path, info: Mapping[str, Any], model: PreTrainedModel, no_values: Collection[str] = ()
) -> None:
    """Raise BillhookError for the faults in `info`, the loading info of `from_pretrained`.

    Left over tensors are accepted where they hold nothing that the model could use: buffers, layers that predict
    several tokens at once, parts that the model does not have, and tensors with `no_values`.
    """
    faults = {"missing_keys": "is missing", "mismatched_keys": "has another shape"}
    faults["unexpected_keys"] = "has no place in the model"
    for key, what in faults.items():
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info.get(key, ()))
        if key == "unexpected_keys":
            names = [name for name in names if not (name in no_values or _harmless(name, names, model))]
        if names:
            more = f" ({len(names) - 1} more like it)" if len(names) > 1 else ""
            raise BillhookError(f"{path} does not fit its config.json: the tensor {names[0]} {what}{more}.")
    if info.get("error_msgs"):
        raise BillhookError(f"{path} cannot be loaded: {str(info['error_msgs'][0]).strip().splitlines()[0][:300]}")


def is_buffer(name: str) -> bool:
    """Whether the name is that of a tensor that no version of a model computes with."""
    return name.rpartition(".")[2] in _BUFFERS or name.endswith(("attn.bias", "attention.bias"))


def _harmless(name: str, names: Sequence[str], model: PreTrainedModel) -> bool:
    """Whether a left over tensor is a buffer, belongs to a part that the model does not have, or to multi-token
    prediction, as blocks after the last one do."""
    config = model.config.get_text_config(decoder=True)
    depth, declared = getattr(config, "num_hidden_layers", 0), getattr(config, "num_nextn_predict_layers", None)
    return _of_another_part(name.split("."), model) or is_unused(name, names, depth, declared or 0)


def is_unused(name: str, names: Collection[str], depth: int, declared: int) -> bool:
    """Whether a tensor, one of `names`, is a buffer or belongs to multi-token prediction, for a model of `depth` blocks
    whose configuration has `declared` blocks of that more."""
    parts = name.split(".")
    number = next((int(part) for part in parts if part.isdigit()), -1)
    beyond = depth <= number < depth + declared or (number >= depth and any(f".{number}.eh_proj." in x for x in names))
    return is_buffer(name) or beyond or any(part.startswith(("mtp", "nextn")) for part in parts)


def _of_another_part(parts: Sequence[str], model: nn.Module) -> bool:
    """Whether a tensor belongs to a head, a pooler or a tower that the model does not have, given its name's parts.

    Inside a block or a layer of the model, a left over tensor means that the configuration is not that of the files.
    """
    inner: nn.Module = model
    for part in parts[:-1]:
        if isinstance(inner, nn.ModuleList | nn.ModuleDict | nn.Sequential) or not inner._modules:
            return False
        if (child := inner._modules.get(part)) is None:
            return not any(True for _ in inner.parameters(recurse=False))
        inner = child
    return False
