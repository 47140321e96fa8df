"""compressed-tensors: quantized weights as `transformers` and vLLM read them (format `pack-quantized`).

A weight `NAME.weight` of type intB/GROUP becomes three tensors:

* `NAME.weight_packed` int32 [out, ⌈in · B / 32⌉]: codes plus 2^(B−1), B bits each, from the lowest bit up;
* `NAME.weight_scale` [out, in / GROUP], float16, or bfloat16 where the model is bfloat16;
* `NAME.weight_shape` int64 [2].

`quantization_config` in config.json names the layers of each type. The packing is that of the compressed-tensors
package, which a reader needs too.
"""

from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.quantize.grid import Grid, Quantized, Scales
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.scalar import Scalar
from billhook.store.fitting import Stored
from billhook.store.shards import Shard

_FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def check_installed() -> None:
    """Raise BillhookError unless the compressed-tensors package is installed."""
    if find_spec("compressed_tensors") is None:
        raise BillhookError(
            "Types intB/GROUP are written for the compressed-tensors package, which is not installed: "
            "pip install compressed-tensors"
        )


def pack(name: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of the weight called `name` (…weight) in the files, by name."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    assert isinstance(weight.grid, Scalar)
    values = (
        pack_to_int32(weight.codes, weight.grid.bits).contiguous(),
        weight.scales.parts["scale"].contiguous(),
        torch.tensor(weight.codes.shape),
    )
    return dict(zip(names(name), values, strict=True))


def read(name: str, grid: Grid, shards: Iterable[Shard]) -> Quantized:
    """The weight called `name` in files; raises KeyError where they do not hold it, ValueError where it is damaged."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    assert isinstance(grid, Scalar)
    parts = names(name)
    found = {part: (shard.path, shard.entries[part]) for shard in shards for part in parts if part in shard.entries}
    packed, scale, sizes = (Stored(*found[part], lazy=False).read() for part in parts)
    shape = tuple(sizes.tolist())
    if len(shape) != 2 or packed.shape != (shape[0], -(-shape[1] * grid.bits // 32)):
        raise ValueError(f"{name} does not hold codes of {grid.bits} bits")
    if scale.shape != (shape[0], shape[1] // grid.group):
        raise ValueError(f"{name} does not hold a scale for every {grid.group} columns")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name} has a scale that is NaN or infinite")
    codes = unpack_from_int32(packed, grid.bits, torch.Size(shape)).to(torch.int8)
    return Quantized(grid, codes, Scales(scale.float(), None, {"scale": scale}))


def zeros(facts: Mapping[str, Any], shape: tuple[int, int], shards: Iterable[Shard]) -> np.ndarray:
    """Whether each weight of a layer in a record with a `type` and a `tensor` is zero, bool [out, in].

    Raises KeyError where its tensors are not in the files, ValueError where they are damaged or of another shape.
    """
    weight = read(str(facts["tensor"]), grid_of(str(facts["type"])), shards)
    if tuple(weight.codes.shape) != shape:
        raise ValueError(f"{facts['tensor']} has another shape")
    found: np.ndarray = (weight.decode(weight.scales.parts["scale"].dtype) == 0).numpy()
    return found


def names(name: str) -> list[str]:
    """The names of the tensors of the weight called `name` (…weight)."""
    return [name.removesuffix("weight") + part for part in PARTS]


def fused(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """The modules that vLLM makes one of, which must share a type."""
    groups: dict[tuple[str, int], list[str]] = {}
    for module in modules:
        parent, _, last = module.rpartition(".")
        for number, names in enumerate(_FUSED):
            if last in names:
                groups.setdefault((parent, number), []).append(module)
    return [tuple(names) for names in groups.values()]


def configuration(types: Mapping[str, Grid], dense: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for the types of modules by name; `dense` modules stay as they are."""
    groups: dict[Scalar, list[str]] = {}
    for module, type in types.items():
        assert isinstance(type, Scalar)
        groups.setdefault(type, []).append(module)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": modules, "weights": _arguments(type)}
            for number, (type, modules) in enumerate(groups.items())
        },
        "ignore": sorted(dense),
    }


def _arguments(type: Scalar) -> dict[str, Any]:
    integers = {"num_bits": type.bits, "type": "int", "symmetric": True, "dynamic": False}
    return {**integers, "strategy": "group", "group_size": type.group}
