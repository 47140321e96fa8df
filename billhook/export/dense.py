"""Write the weights of a model directory as ordinary tensors of 16 bits, decoding those of compressed-tensors.

One file is read and written at a time, under its own name. Weights in 16 bits keep their bytes unless they are to have
another dtype; integers always do.

Limit: of the formats of compressed-tensors, `pack-quantized` with symmetric groups, as `billhook quantize` writes it.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from billhook.errors import BillhookError, JobError
from billhook.export import compressed_tensors
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.scalar import Scalar
from billhook.store.files import repair, untrusted
from billhook.store.fitting import Stored
from billhook.store.shards import read_shard, weight_files, weights_index, write_index

_PACKED = f".{compressed_tensors.PARTS[0]}"
_OTHER = (".weight_g_idx", ".weight_zero_point")  # of formats that are not read


def packed_grids(source: Path, config: Mapping[str, Any]) -> dict[str, Scalar]:
    """The grids of the packed weights of a model directory, by the names (…weight) that they have when decoded.

    Raises BillhookError for a format that is not read.
    """
    shards = [read_shard(file) for file in weight_files(source)]
    names = {name for shard in shards for name in shard.entries}
    given, advice = config.get("quantization_config"), "Export the unquantized model, or read it with transformers."
    with untrusted(f"The quantization_config of {source} is not one that compressed-tensors reads", advice):
        if not given:
            return {}
        other = next((name for name in sorted(names) if name.endswith(_OTHER)), None)
        if given["format"] != "pack-quantized" or other is not None:
            what = other or f"its format is {given['format']!r:.40}"
            raise BillhookError(f"{source} is not decoded ({what}): only pack-quantized symmetric groups. {advice}")
        modules = [name.removesuffix(_PACKED) for name in sorted(names) if name.endswith(_PACKED)]
        return {f"{name}.weight": _grid(name, given["config_groups"].values()) for name in modules}


def _grid(module: str, groups: Collection[Mapping[str, Any]]) -> Scalar:
    """The grid of a module; raises ValueError for one that is in no group or of a kind that is not read."""

    def holds(target: str) -> bool:
        return target in (module, "Linear") or (target.startswith("re:") and bool(re.match(target[3:], module)))

    for group in groups:
        if any(map(holds, group["targets"])):
            weights = group["weights"]
            bits, columns = weights["num_bits"], weights["group_size"]
            known = weights["type"] == "int" and weights["symmetric"] is True and weights["strategy"] == "group"
            grid = grid_of(f"int{bits}/{columns}") if known else None
            if not isinstance(grid, Scalar):
                raise ValueError(f"{module} is not of symmetric integers in groups")
            return grid
    raise ValueError(f"{module} is in no group")


def dense_bytes(source: Path, grids: Mapping[str, Scalar]) -> int:
    """The most bytes that the decoded weights take in 16 bits, or as stored."""
    shards = [read_shard(file) for file in weight_files(source)]
    sizes = {entry.name: entry.stop - entry.start for shard in shards for entry in shard.entries.values()}
    packed = {name: grids[name.removesuffix("_packed")].bits for name in sizes if name.removesuffix("_packed") in grids}
    return sum(size * 16 // packed.get(name, 16) for name, size in sizes.items())


def write_dense(
    source: Path,
    folder: Path,
    grids: Mapping[str, Scalar],
    dtype: torch.dtype | None,
    progress: Callable[[str], None] = lambda tensor: None,
) -> None:
    """Write the weight files of `source` into `folder`, decoded, in `dtype` (None: that of the scales, and as stored).

    Raises BillhookError for a weight that is damaged, JobError for values that are not finite or do not fit the dtype.
    """
    shards = [read_shard(file) for file in weight_files(source)]
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        for name, entry in shard.entries.items():
            decoded = name.removesuffix("_packed")
            base = re.sub(r"_(scale|shape)$", "", name)
            if decoded in grids and name != decoded:
                with untrusted(f"{source} holds a weight that cannot be decoded", repair(source)):
                    weight = compressed_tensors.read(decoded, grids[decoded], shards)
                tensors[decoded] = weight.decode(dtype or weight.scales.parts["scale"].dtype)
            elif base not in grids:
                value = Stored(shard.path, entry, lazy=False).read()
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise JobError(f"{name} holds NaN or infinite values: the model is damaged.")
                tensors[name] = value.to(dtype) if dtype is not None and value.is_floating_point() else value
            progress(name)
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise JobError(f"{name} holds values that do not fit {dtype}: use --type bf16 or f32.")
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / shard.path.name, metadata={"format": "pt"})
    if weights_index(source) is not None:
        write_index(folder, [shard.path.name for shard in shards])
