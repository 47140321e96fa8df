"""Quantized weights as the bytes of GGUF files, and back.

A block of columns is a record. `_LAYOUTS` lists its fields in order: each holds some bits of an array of integers.
Fields of 8 bits or more are little-endian numbers. Narrower ones share bytes: the array is cut into runs, and a byte
holds one value of each of as many consecutive runs as fit, the first in the lowest bits. The layouts are those of the
dequantizers in the `gguf` package, against which they are tested.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from billhook.errors import JobError
from billhook.methods.quantize.code_books import CodeBook, book
from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.grid import Quantized
from billhook.methods.quantize.symmetric import position
from billhook.plan.storage import BLOCKS

Field = tuple[str, int, int, int]  # an array, its first bit here, the number of bits, and the run
_D, _M, _DMIN = ("d", 0, 16, 1), ("m", 0, 16, 1), ("dmin", 0, 16, 1)
_FOUR, _FOUR_32, _HIGH, _HIGH_32 = ("codes", 0, 4, 16), ("codes", 0, 4, 32), ("codes", 4, 1, 1), ("codes", 4, 1, 32)
_INDEX, _SIGNS, _NIBBLES = ("index", 0, 8, 1), ("signs", 0, 8, 1), ("multipliers", 0, 4, 1)
_LAYOUTS: dict[str, tuple[Field, ...]] = {
    "q4_0": (_D, _FOUR),
    "q4_1": (_D, _M, _FOUR),
    "q5_0": (_D, _HIGH, _FOUR),
    "q5_1": (_D, _M, _HIGH, _FOUR),
    "q8_0": (_D, ("codes", 0, 8, 1)),
    "iq4_nl": (_D, _FOUR),
    "iq4_xs": (_D, ("multipliers", 4, 2, 1), _NIBBLES, _FOUR),
    "mxfp4": (("exponents", 0, 8, 1), _FOUR),
    "q2_0": (_D, ("codes", 0, 2, 1)),
    "q2_k": (("integers", 0, 8, 1), ("codes", 0, 2, 32), _D, _DMIN),
    "q3_k": (("codes", 2, 1, 32), ("codes", 0, 2, 32), ("multipliers", 0, 4, 8), ("multipliers", 4, 2, 4), _D),
    "q4_k": (_D, _DMIN, ("integers", 0, 8, 1), _FOUR_32),
    "q5_k": (_D, _DMIN, ("integers", 0, 8, 1), _HIGH_32, _FOUR_32),
    "q6_k": (("codes", 0, 4, 64), ("codes", 4, 2, 32), ("multipliers", 0, 8, 1), _D),
    "iq2_xxs": (_D, ("words", 0, 32, 1)),
    "iq2_xs": (_D, ("words", 0, 16, 1), _NIBBLES),
    "iq2_s": (_D, _INDEX, _SIGNS, ("index", 8, 2, 1), _NIBBLES),
    "iq3_xxs": (_D, _INDEX, ("words", 0, 32, 1)),
    "iq3_s": (_D, _INDEX, ("index", 8, 1, 1), _SIGNS, _NIBBLES),
}
_COUNTS = {  # of numbers for a block, in arrays that are joined from others
    "q2_k": {"integers": 16},
    "q4_k": {"integers": 12},
    "q5_k": {"integers": 12},
    "iq2_xxs": {"words": 16},
    "iq2_xs": {"words": 32},
    "iq3_xxs": {"words": 8},
}
_STORED = {"mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)}  # codes by number, if not ascending
_CODE_BIAS = {"q2_0": 1, "q4_0": 8, "q5_0": 16, "q3_k": 4, "q6_k": 32}  # what is added to a code to be stored
_EXPONENT_BIAS = 127  # of a scale in [½, 1)
_MULTIPLIER_BIAS = {"q3_k": 32, "iq4_xs": 32}
_WEIGHTS_AT_ONCE = 1 << 21


def pack(quantized: Quantized) -> Tensor:
    """The bytes of a weight of a type of `GGML`, uint8 [out, bytes]."""
    codes, parts, name = quantized.codes, quantized.scales.parts, quantized.grid.name
    rows = max(1, _WEIGHTS_AT_ONCE // codes.shape[1])
    packed = []
    for start in range(0, len(codes), rows):
        some = slice(start, start + rows)
        arrays = _to_arrays(name, codes[some].contiguous(), {part: value[some] for part, value in parts.items()})
        fields = [_pack_field((arrays[array] >> first), bits, run) for array, first, bits, run in _LAYOUTS[name]]
        packed.append(torch.cat(fields, 2).flatten(1))
    return torch.cat(packed)


def unpack(data: Tensor, name: str) -> Quantized:
    """The weight that is stored in `data` uint8 [out, bytes] as a type of `GGML`; codes are 0 where a scale is 0.

    Raises JobError for bytes that are not whole blocks, and for scales that are not finite.
    """
    if data.shape[1] % BLOCKS[name][1]:
        raise JobError(f"{data.shape[1]} bytes a row are not whole blocks of {name}, {BLOCKS[name][1]} bytes each.")
    grid, rows = GGML[name], max(1, _WEIGHTS_AT_ONCE // (2 * data.shape[1]))
    codes, parts = zip(*(_from_bytes(name, some) for some in data.split(rows)), strict=True)
    scales = grid.decoded({part: torch.cat([p[part] for p in parts]) for part in parts[0]})
    unused = (scales.scale == 0).repeat_interleave(grid.group, dim=1)
    return Quantized(grid, torch.cat(codes).masked_fill_(unused, 0), scales)


def _from_bytes(name: str, data: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes int8 [out, in] and the parts of scales."""
    blocks, at = data.view(len(data), -1, BLOCKS[name][1]), 0
    arrays: dict[str, Tensor] = {}
    for array, first, bits, run in _LAYOUTS[name]:
        size = _count(name, array) * bits // 8
        values = _unpack_field(blocks[:, :, at : at + size].long(), bits, run) << first
        arrays[array] = arrays[array] | values if array in arrays else values
        at += size
    return _from_arrays(name, arrays)


def _count(name: str, array: str) -> int:
    """How many numbers an array has for a block."""
    grid = GGML[name]
    dim = grid.dim if isinstance(grid, CodeBook) else 1
    sizes = {"codes": grid.block, "multipliers": grid.block // grid.group, "index": grid.block // dim}
    sizes |= {"signs": grid.block // 8, **_COUNTS.get(name, {})}
    return sizes.get(array, 1)


def _to_arrays(name: str, codes: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The integers of `_LAYOUTS`, int64 [out, blocks, n], from codes int8 [out, in] and the parts of scales."""
    grid = GGML[name]
    arrays = {part: parts[part].view(torch.int16)[:, :, None].long() for part in ("d", "m", "dmin") if part in parts}
    blocked = codes.view(len(codes), -1, grid.block).long()
    if "multipliers" in parts:
        multipliers = parts["multipliers"].view(*blocked.shape[:2], -1).long()
        arrays["multipliers"] = multipliers + _MULTIPLIER_BIAS.get(name, 0)
    if "minima" in parts:
        arrays["integers"] = _join_minima(name, multipliers, parts["minima"].view_as(multipliers).long())
    if isinstance(grid, CodeBook):
        arrays["multipliers"] = multipliers >> 1  # from odd numbers
        arrays |= {"index": grid.index(blocked), "signs": _pack_field(blocked < 0, 1, 1).long()}
        return _join_words(name, arrays)
    if "scale" in parts:
        arrays["exponents"] = (torch.frexp(parts["scale"])[1] + _EXPONENT_BIAS)[:, :, None].long()
    if isinstance(grid.points, tuple):
        stored = _STORED.get(name, grid.points)
        numbers = torch.tensor([stored.index(value) for value in grid.points], device=codes.device)
        return arrays | {"codes": numbers[position(blocked, grid.points)]}
    return arrays | {"codes": blocked + _CODE_BIAS.get(name, 0)}


def _from_arrays(name: str, arrays: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes int8 [out, in] and the parts of scales: the inverse of `_to_arrays`."""
    grid, arrays = GGML[name], _split_words(name, arrays)
    halves = arrays.keys() & {"d", "m", "dmin"}
    parts = {part: arrays[part][:, :, 0].to(torch.int16).view(torch.float16) for part in sorted(halves)}
    if "exponents" in arrays:
        exponents = arrays["exponents"][:, :, 0] - _EXPONENT_BIAS - 1
        parts["scale"] = torch.ldexp(torch.ones(exponents.shape, device=exponents.device), exponents)
    if "integers" in arrays:
        multipliers, parts["minima"] = (x.flatten(1).to(torch.int8) for x in _split_minima(name, arrays["integers"]))
        parts["multipliers"] = multipliers
    elif "multipliers" in arrays:
        multipliers = arrays["multipliers"].flatten(1)
        multipliers = multipliers * 2 + 1 if isinstance(grid, CodeBook) else multipliers - _MULTIPLIER_BIAS.get(name, 0)
        parts["multipliers"] = multipliers.to(torch.int8)
    if isinstance(grid, CodeBook):
        signs = _unpack_field(arrays["signs"], 1, 1)
        codes = book(name, signs.device).to(torch.int8)[arrays["index"]].flatten(2) * (1 - 2 * signs)
    elif isinstance(grid.points, tuple):
        stored = _STORED.get(name, grid.points)
        codes = torch.tensor(stored, device=arrays["codes"].device)[arrays["codes"]]
    else:
        codes = arrays["codes"] - _CODE_BIAS.get(name, 0)
    return codes.flatten(1).to(torch.int8), parts


def _join_minima(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Multipliers and minima of a block as bytes: of 4 bits side by side, or of 6 bits in 12 bytes."""
    if name == "q2_k":
        return a | b << 4
    low = a[:, :, 4:] & 15 | (b[:, :, 4:] & 15) << 4
    return torch.cat([x[:, :, :4] | (x[:, :, 4:] >> 4) << 6 for x in (a, b)] + [low], 2)


def _split_minima(name: str, joined: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_join_minima`."""
    if name == "q2_k":
        return joined & 15, joined >> 4
    a, b, low = joined.split(4, 2)
    return (
        torch.cat([a & 63, low & 15 | (a >> 6) << 4], 2),
        torch.cat([b & 63, low >> 4 | (b >> 6) << 4], 2),
    )


def _join_words(name: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the numbers of 16 or 32 bits that hold seven signs, and points or multipliers beside them."""
    index, signs = arrays["index"], arrays["signs"] & 127
    if name == "iq2_xs":
        arrays["words"] = index | signs << 9
    if name in ("iq2_xxs", "iq3_xxs"):
        arrays["words"] = _joined(signs, 7) | arrays["multipliers"] << 28
    if name == "iq2_xxs":
        arrays["words"] = torch.stack([_joined(index, 8), arrays["words"]], 3).flatten(2)
    return arrays


def _split_words(name: str, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_join_words`; the eighth sign makes the number of minus signs even."""
    arrays = dict(arrays)
    if "words" not in arrays:
        return arrays
    words = arrays.pop("words")
    if name == "iq2_xs":
        arrays["index"], signs = words & 511, words >> 9
    else:
        if name == "iq2_xxs":
            points, words = words.unflatten(2, (-1, 2)).unbind(3)
            arrays["index"] = torch.stack([points >> k & 255 for k in (0, 8, 16, 24)], 3).flatten(2)
        signs = torch.stack([words >> k & 127 for k in (0, 7, 14, 21)], 3).flatten(2)
        arrays["multipliers"] = words >> 28
    parity = sum(signs >> k for k in range(7)) & 1
    return arrays | {"signs": signs | parity << 7}


def _joined(values: Tensor, bits: int) -> Tensor:
    """Each four values as one number, the first in the lowest bits."""
    fours = values.unflatten(2, (-1, 4))
    return sum(fours[:, :, :, k] << bits * k for k in range(4))


def _pack_field(values: Tensor, bits: int, run: int) -> Tensor:
    """The lowest `bits` of values int64 [out, blocks, n] as bytes, uint8 [out, blocks, n · bits / 8]."""
    values = values & (1 << bits) - 1
    if bits >= 8:
        return torch.stack([values >> k & 255 for k in range(0, bits, 8)], 3).flatten(2).to(torch.uint8)
    runs = values.unflatten(2, (-1, 8 // bits, run))
    return sum(runs[:, :, :, k] << bits * k for k in range(8 // bits)).flatten(2).to(torch.uint8)


def _unpack_field(data: Tensor, bits: int, run: int) -> Tensor:
    """Values int64 [out, blocks, n] from int64 [out, blocks, bytes]."""
    if bits >= 8:
        numbers = data.unflatten(2, (-1, bits // 8))
        return sum(numbers[:, :, :, k] << 8 * k for k in range(bits // 8))
    runs = data.unflatten(2, (-1, run))
    return torch.stack([runs >> bits * k & (1 << bits) - 1 for k in range(8 // bits)], 3).flatten(2)
