"""The size that a compressed file may have, what it must hold in any case, and the types that fit."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from billhook.errors import BillhookError
from billhook.export.compressed_tensors import names
from billhook.methods.quantize.ggml import GGML
from billhook.plan.storage import BLOCKS, bits, block, stored_bytes
from billhook.steps.parts import Parts, part_types
from billhook.steps.request import Opened
from billhook.steps.types import file_bytes, outside_matrices

_SCALARS = {"transformers": (2, 3, 4, 5, 6, 8), "vllm": (4, 8)}
_OUTSIDE = ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "iq4_nl")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FILE_BYTES = 64  # of a safetensors file, beside its tensors and their names
_SPAN = 1.75, 3.0  # bits below and above the budget's that are tried


@dataclass(frozen=True)
class Size:
    """The size asked for: one of `size` (bytes, or such as "2.5GB"), `bits` (per parameter of the model, everything
    counted) and `ratio` (of the size in 16 bits)."""

    size: str | int | None = None
    bits: float | None = None
    ratio: float | None = None


def parse_size(size: str | int) -> int:
    """Bytes of a size such as 2500000000, "2.5GB" (10^9) or "2GiB" (2^30); raises BillhookError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", str(size).strip(), re.IGNORECASE)
    unit = found[2].upper() if found else "?"
    unit += "B" if unit in ("K", "M", "G", "KI", "MI", "GI") else ""
    if found is None or unit not in _UNITS or float(found[1]) <= 0:
        raise BillhookError(f"The size {size!r:.40} is not a number of bytes, such as 2.5GB, 800MB or 2GiB.")
    return int(float(found[1]) * _UNITS[unit])


def allowed_types(target: str, given: Sequence[str]) -> list[str]:
    """The types to choose from; raises BillhookError for one that the target cannot hold."""
    if target == "gguf":
        possible = list(GGML)
    elif target in _SCALARS:
        possible = [f"int{b}/{group}" for b in _SCALARS[target] for group in (64, 32, 16)]
    else:
        raise BillhookError(f"Unknown target {target!r:.40}: use gguf, transformers or vllm.")
    for type in given:
        if type not in possible:
            raise BillhookError(f"{target} files cannot hold {type}: there are {', '.join(possible)}.")
    return list(given) or possible


@dataclass(frozen=True)
class Sizes:
    """What the file consists of: `budget` bytes, `fixed` of which are taken by everything that is not quantized."""

    budget: int
    fixed: int
    menus: Mapping[str, list[str]]
    outside: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, given: Size, opened: Opened, parts: Parts, types: Sequence[str], target: str) -> "Sizes":
        """The sizes for a request and the types to choose from; `parts` are the layers' places on disk.

        Raises BillhookError for a budget that cannot be met, with the least possible size.
        """
        stream = opened.resources.stream
        assert stream is not None
        entries = {name: stored.entry for name, stored in stream.source.items()}
        parameters = sum(int(np.prod(entry.shape)) for entry in entries.values())
        budget = _budget(given, parameters)
        outside = outside_matrices(opened.model, stream) if target == "gguf" else {}
        menus = {layer.name: _menu(layer.shape[1], types, layer.name) for layer in opened.layers}
        shapes = {layer.name: layer.shape for layer in opened.layers}
        least = {name: min(menu, key=bits) for name, menu in menus.items()}
        least_outside = {name: min(outside_menu(shape[1]), key=bits) for name, shape in outside.items()}
        quantized = sum(stored_bytes(t, shapes[name]) for name, t in least.items())
        quantized += sum(stored_bytes(t, outside[name]) for name, t in least_outside.items())
        if target == "gguf":
            on_disk = part_types(parts, least) | least_outside
            padding = 32 * len(on_disk)  # the length of every tensor is rounded up to the alignment
            fixed = file_bytes(opened, on_disk, "gptq") - quantized + padding
        else:
            tensors = {part.tensor for several in parts.values() for part in several}
            kept = entries.keys() - tensors
            fixed = sum(entries[name].stop - entries[name].start for name in kept) + 16 * len(tensors)
            fixed += _header_bytes([*kept, *(part for name in tensors for part in names(name))])
            fixed += _FILE_BYTES * (1 + len(stream.blocks))
        smallest = fixed + quantized
        if smallest > budget:
            raise BillhookError(
                f"{budget:,} bytes cannot be met: the least possible with these types is {smallest:,} bytes "
                f"({8 * smallest / parameters:.2f} bits a parameter), of which {fixed:,} are not quantized."
            )
        return cls(budget, fixed, _near(menus, shapes, budget - fixed, list(outside.values())), outside)


def _budget(given: Size, parameters: int) -> int:
    """The bytes asked for."""
    values = [value for value in (given.size, given.bits, given.ratio) if value is not None]
    if len(values) != 1:
        raise BillhookError("Give exactly one of size (2.5GB), bits (3.5, per parameter) and ratio (0.25, of 16 bits).")
    if given.size is not None:
        return parse_size(given.size)
    per_parameter = given.bits if given.bits is not None else 16 * (given.ratio or 0)
    if not 0 < per_parameter <= 32:
        raise BillhookError(f"{values[0]} is not a number of bits in (0, 32], or a ratio in (0, 2].")
    return int(parameters * per_parameter / 8)


def _menu(columns: int, types: Sequence[str], layer: str) -> list[str]:
    """The types whose blocks divide a layer's columns; of scalar types those with the largest such group."""
    found = [t for t in types if columns % block(t) == 0]
    best = {t.partition("/")[0]: t for t in sorted(found, key=lambda t: -bits(t))}
    menu = [t for t in found if "/" not in t or best[t.partition("/")[0]] == t]
    if not menu:
        raise BillhookError(f"No type divides the {columns} columns of {layer}: leave it out with --ignore {layer}.")
    return menu


def outside_menu(columns: int) -> list[str]:
    """The types of embeddings and head to choose from."""
    return [t for t in _OUTSIDE if columns % BLOCKS[t][0] == 0]


def _header_bytes(tensors: Sequence[str]) -> int:
    """The most bytes of tensors in the headers of safetensors files."""
    entry = {"dtype": "BF16", "shape": [10**6, 10**6], "data_offsets": [10**10, 10**10]}
    return sum(len(json.dumps({name: entry}, separators=(",", ":"))) for name in tensors)


def _near(
    menus: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    outside: Sequence[tuple[int, int]],
) -> dict[str, list[str]]:
    """The menus without types far from the mean bits of the layers, which take time to measure.

    The smallest type and the smallest above the mean (or else the largest) always stay. Of the budget, embeddings and
    head, of the shapes `outside`, may take the least or the most.
    """
    taken = [[stored_bytes(t, shape) for t in outside_menu(shape[1])] for shape in outside]
    weights = sum(out * columns for out, columns in shapes.values())
    low, high = (8 * (budget - sum(map(extreme, taken))) / weights for extreme in (max, min))
    near = {}
    for name, menu in menus.items():
        above = min((t for t in menu if bits(t) > high), key=bits, default=max(menu, key=bits))
        always = {min(menu, key=bits), above}
        near[name] = [t for t in menu if t in always or low - _SPAN[0] <= bits(t) <= high + _SPAN[1]]
    return near
