"""compressed-tensors: quantized weights as `transformers` and vLLM read them (format `pack-quantized`).

A weight `NAME.weight` of type intB/GROUP becomes three tensors:

* `NAME.weight_packed` int32 [out, ⌈in · B / 32⌉]: codes plus 2^(B−1), B bits each, from the lowest bit up;
* `NAME.weight_scale` [out, in / GROUP], float16, or bfloat16 where the model is bfloat16;
* `NAME.weight_shape` int64 [2].

`quantization_config` in config.json names the layers of each type. The packing is that of the compressed-tensors
package, which a reader needs too.
"""

from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.quantize.grid import Quantized, Scales
from billhook.methods.quantize.scalar import Scalar

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


def unpack(name: str, type: Scalar, read: Callable[[str], Tensor]) -> Quantized:
    """The weight called `name`; `read` gives a tensor of the files by its name."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed, scale, shape = (read(part) for part in names(name))
    codes = unpack_from_int32(packed, type.bits, torch.Size(shape.tolist()))
    return Quantized(type, codes, Scales(scale.float(), None, {"scale": scale}))


def names(name: str) -> list[str]:
    """The names of the tensors of the weight called `name` (…weight)."""
    return [name.removesuffix("weight") + part for part in PARTS]


def configuration(types: Mapping[str, Scalar], dense: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for the types of modules by name; `dense` modules stay as they are."""
    groups: dict[Scalar, list[str]] = {}
    for module, type in types.items():
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
