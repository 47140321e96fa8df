"""The size that a compressed file may have, what it must hold in any case, and the types that fit."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from billhook.architectures.config import context_length
from billhook.architectures.context_memory import ContextMemory, context_memory
from billhook.errors import BillhookError, ignoring
from billhook.export.compressed_tensors import names
from billhook.export.gguf import GgufForm
from billhook.export.gguf_writer import ALIGNMENT
from billhook.methods.quantize.code_books import CodeBook
from billhook.methods.quantize.ggml import GGML
from billhook.plan.bytes import parse_size
from billhook.plan.storage import bits, block, stored_bytes
from billhook.steps.parts import Parts, part_types
from billhook.steps.request import Opened
from billhook.steps.types import file_bytes, outside_matrices

_SCALARS = {"transformers": (2, 3, 4, 5, 6, 8), "vllm": (4, 8)}
_OUTSIDE = ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "iq4_nl", "iq4_xs", "q3_k", "q2_k")
_FILE_BYTES = 64  # of a safetensors file, beside its tensors and their names
_CONTEXT = 8192  # tokens, where none are given
_SPAN = 1.75, 3.0  # bits below and above the budget's that are tried


@dataclass(frozen=True)
class Size:
    """The size asked for: one of `size` (bytes, or such as "2.5GB"), `bits` (per parameter of the model, everything
    counted), `ratio` (of the size in 16 bits) and `fit`, the memory in which the file and a `context` of so many tokens
    must fit in llama.cpp (None: 8192, or the model's if that is shorter)."""

    size: str | int | None = None
    bits: float | None = None
    ratio: float | None = None
    fit: str | int | None = None
    context: int | None = None

    def check(self, target: str) -> None:
        """Raise BillhookError unless exactly one size is given that the target can meet."""
        values = [value for value in (self.size, self.bits, self.ratio, self.fit) if value is not None]
        if len(values) != 1:
            raise BillhookError(
                "Give exactly one of size (2.5GB), bits (3.5, per parameter), ratio (0.25, of 16 bits) and fit (16GB, "
                "with a context)."
            )
        per_parameter = self.bits if self.bits is not None else None if self.ratio is None else 16 * self.ratio
        if per_parameter is not None and not 0 < per_parameter <= 32:
            raise BillhookError(f"{values[0]} is not a number of bits in (0, 32], or a ratio in (0, 2].")
        for size in (self.size, self.fit):
            if size is not None:
                parse_size(size)
        if self.context is not None and (self.fit is None or self.context < 1):
            raise BillhookError("A context is a number of tokens, and counts only with --fit.")
        if self.fit is not None and target != "gguf":
            raise BillhookError(
                f"--fit is for llama.cpp (--for gguf): what {target} needs beside the weights was not measured, and "
                "transformers decodes them when it loads them. Give --size."
            )

    def budget(self, config: Any, parameters: int) -> tuple[int, ContextMemory | None]:
        """The bytes of the file, and what a context takes beside it, given the model's configuration and number of
        parameters.

        Raises BillhookError for a context that the model does not have, or that leaves nothing for the file.
        """
        if self.size is not None:
            return parse_size(self.size), None
        if self.fit is None:
            return int(parameters * (self.bits if self.bits is not None else 16 * (self.ratio or 0)) / 8), None
        longest, memory = context_length(config), parse_size(self.fit)
        tokens = self.context or min(_CONTEXT, longest or _CONTEXT)
        if longest is not None and tokens > longest:
            raise BillhookError(
                f"A context of {tokens:,} tokens exceeds the model's of {longest:,}: use --context {longest} or less."
            )
        taken = context_memory(config, tokens)
        if taken.total >= memory:
            raise BillhookError(
                f"{memory:,} bytes are not enough: {taken}, {taken.total:,} in all, and nothing is left for the file. "
                + ("Give a shorter --context." if context_memory(config, 1).total < memory else "Give more memory.")
            )
        return memory - taken.total, taken


def allowed_types(target: str, given: Sequence[str]) -> list[str]:
    """The types to choose from, int4 being int4 with any group; raises BillhookError for one that the target cannot
    hold."""
    scalars = [f"int{b}/{group}" for b in _SCALARS.get(target, ()) for group in (64, 32, 16)]
    possible = list(GGML) if target == "gguf" else scalars
    chosen = []
    for type in map(str.lower, given):
        found = [t for t in possible if type in (t, t.partition("/")[0])]
        if not found:
            raise BillhookError(f"{target} files cannot hold {type}: there are {', '.join(possible)}.")
        chosen += found
    return list(dict.fromkeys(chosen)) or possible


class TooSmall(BillhookError):
    """A size below that of the file with the smallest types."""


@dataclass(frozen=True)
class Sizes:
    """What the file consists of: `budget` bytes, `fixed` of which are taken by everything that is not quantized.

    `menus` and `outside_menus` are the types to choose from, of the layers by name, and of embeddings and head, of the
    shapes `outside`, by their names on disk. `memory` is what a context takes, where the file is to fit in memory.
    """

    budget: int
    fixed: int
    menus: Mapping[str, list[str]]
    outside: Mapping[str, tuple[int, int]]
    outside_menus: Mapping[str, list[str]]
    memory: ContextMemory | None

    @classmethod
    def of(
        cls, given: Size, opened: Opened, parts: Parts, types: Sequence[str], target: str, *, form: GgufForm
    ) -> "Sizes":
        """The sizes for a request and the types to choose from; `parts` are the layers' places on disk, and `form` that
        of a GGUF file (`GgufInputs.gguf_form`).

        Raises TooSmall for a budget that cannot be met, with the least possible size and what takes it.
        """
        stream = opened.resources.stream
        assert stream is not None
        entries = {name: stored.entry for name, stored in stream.source.items()}
        parameters = sum(int(np.prod(entry.shape)) for entry in entries.values())
        budget, memory = given.budget(opened.model.config, parameters)
        outside = outside_matrices(opened.model, stream) if target == "gguf" else {}
        menus = {layer.name: _menu(layer.shape[1], types) for layer in opened.layers}
        if without := [layer for layer in opened.layers if not menus[layer.name]]:
            advice = None if len(without) < len(menus) else "no layer fits, so nothing can be quantized"
            raise _no_type(without[0].shape[1], types, [layer.name for layer in without], advice)
        outside_menus = {name: outside_menu(name, shape[1], types) for name, shape in outside.items()}
        shapes = {layer.name: layer.shape for layer in opened.layers}
        least, least_outside = ({n: min(m, key=bits) for n, m in of.items()} for of in (menus, outside_menus))
        layers = sum(stored_bytes(t, shapes[name]) for name, t in least.items())
        around = sum(stored_bytes(t, outside[name]) for name, t in least_outside.items())
        if target == "gguf":
            fixed = _beside(opened, parts, menus, outside_menus, {**shapes, **outside}, form)
            rows = {name: [part.last - part.first for part in several] for name, several in parts.items()}
            fixed += _padding((menus[n], r, shapes[n][1]) for n, several in rows.items() for r in several)
            fixed += _padding((menu, *outside[name]) for name, menu in outside_menus.items())
        else:
            tensors = {part.tensor for several in parts.values() for part in several}
            kept = entries.keys() - tensors
            fixed = sum(entries[name].stop - entries[name].start for name in kept) + 16 * len(tensors)
            fixed += _header_bytes([*kept, *(part for name in tensors for part in names(name))])
            fixed += _FILE_BYTES * (1 + len(stream.blocks))
        if fixed + layers + around > budget:
            found = _Least(layers, around, fixed, sorted(set(least.values())), parameters)
            left = "" if memory is None else f"In {memory.total + budget:,} bytes {memory}. "
            refused = found.refusal(budget, target, whole=len(types) == len(allowed_types(target, ())))
            raise TooSmall(left + refused)
        near = _near(menus, shapes, budget - fixed, [(outside[name], m) for name, m in outside_menus.items()])
        return cls(budget, fixed, near, outside, outside_menus, memory)

    def most_room(self, opened: Opened, parts: Parts, target: str) -> int:
        """The most bytes that writing the result can take on the disk: the files of blocks, and a GGUF file beside
        them, which is at most the budget."""
        if target != "gguf":
            return self.budget
        stream = opened.resources.stream
        assert stream is not None
        quantized = {part.tensor for several in parts.values() for part in several} | self.outside.keys()
        kept = sum(x.entry.stop - x.entry.start for name, x in stream.source.items() if name not in quantized)
        return 2 * self.budget + kept - self.fixed


@dataclass(frozen=True)
class _Least:
    """The smallest file: the bytes of layers, of embeddings and head, and of everything that is not quantized; the
    smallest `types` of layers; and the number of parameters of the model."""

    layers: int
    outside: int
    fixed: int
    types: list[str]
    parameters: int

    def refusal(self, budget: int, target: str, *, whole: bool) -> str:
        """What to say about a `budget` below it; `whole` where all types of the target were allowed."""
        size = self.layers + self.outside + self.fixed
        parts = [f"{self.layers:,} of layers ({', '.join(self.types)})"]
        parts += [f"{self.outside:,} of embeddings and head"] if self.outside else []
        parts.append(f"{self.fixed:,} that are not quantized")
        if target != "gguf":
            advice = "Embeddings and head are quantized only in a file of --for gguf."
        elif whole:
            advice = "A smaller model is needed, or fewer layers left out with --ignore or --targets."
        else:
            advice = "Allow smaller --types, or leave fewer layers out with --ignore or --targets."
        return (
            f"{budget:,} bytes cannot be met: the least possible with these types is {size:,} bytes "
            f"({8 * size / self.parameters:.2f} bits a parameter), which are {', '.join(parts)}. {advice}"
        )


def _menu(columns: int, types: Sequence[str]) -> list[str]:
    """The types whose blocks divide a layer's columns; of scalar types those with the largest such group."""
    found = [t for t in types if columns % block(t) == 0]
    best = {t.partition("/")[0]: t for t in sorted(found, key=lambda t: -bits(t))}
    return [t for t in found if "/" not in t or best[t.partition("/")[0]] == t]


def _no_type(columns: int, types: Sequence[str], names: Sequence[str], advice: str | None = None) -> BillhookError:
    """What to say of tensors, the first with so many columns, that no type fits; `advice` in place of leaving them
    out."""
    others = [t for t in GGML if columns % block(t) == 0] if types[0] in GGML else []
    more = f"allow a type that does with --types ({', '.join(others)})" if others else ""
    out = f"leave out what does not fit: {ignoring(names)}" if advice is None else "" if others else advice
    what = f"None of the types divides the {columns} columns of {names[0]}"
    return BillhookError(f"{what}: {', or '.join(part for part in (more, out) if part)}.")


def outside_menu(name: str, columns: int, types: Sequence[str]) -> list[str]:
    """The types of embeddings and head to choose from: those of `types` without a code book, which takes long to search
    for so many rows (of all types, those in `_OUTSIDE`); where none of these fits, all of `types` that fit."""
    fits = [t for t in types if columns % block(t) == 0]
    whole = set(types) == set(GGML)
    quick = [t for t in fits if (t in _OUTSIDE if whole else not isinstance(GGML[t], CodeBook))]
    if not fits:
        raise _no_type(columns, types, [name])
    return quick or fits


def _beside(
    opened: Opened,
    parts: Parts,
    menus: Mapping[str, list[str]],
    outside: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, int]],
    form: GgufForm,
) -> int:
    """The most bytes of a GGUF file beside the quantized tensors, those of layers and of embeddings and head `outside`,
    with these menus. Of a split file, which has the most parts with the largest types, the header of each part."""

    def with_types(extreme: Callable[..., str]) -> int:
        layers, others = ({name: extreme(menu, key=bits) for name, menu in of.items()} for of in (menus, outside))
        whole = file_bytes(opened, part_types(parts, layers) | others, "gptq", form)
        return whole - sum(stored_bytes(t, shapes[name]) for name, t in {**layers, **others}.items())

    if form["split"] is None:
        return with_types(min)
    lengths = ALIGNMENT * sum(map(len, parts.values()))  # which tensors are in a part changes the length of its header
    return max(with_types(min), with_types(max)) + lengths


def _padding(matrices: Iterable[tuple[Sequence[str], int, int]]) -> int:
    """The most bytes by which the lengths of the tensors of a GGUF file are rounded up to its alignment, for matrices
    with these menus, rows and columns; those that become one tensor are padded by no more."""
    counts = Counter((tuple(menu), rows, columns) for menu, rows, columns in matrices)
    return sum(
        count * max(-stored_bytes(t, (rows, columns)) % ALIGNMENT for t in menu)
        for (menu, rows, columns), count in counts.items()
    )


def _header_bytes(tensors: Sequence[str]) -> int:
    """The most bytes of tensors in the headers of safetensors files."""
    entry = {"dtype": "BF16", "shape": [10**6, 10**6], "data_offsets": [10**10, 10**10]}
    return sum(len(json.dumps({name: entry}, separators=(",", ":"))) for name in tensors)


def _near(
    menus: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    outside: Sequence[tuple[tuple[int, int], Sequence[str]]],
) -> dict[str, list[str]]:
    """The menus without types far from the mean bits of the layers, which take time to measure.

    The smallest type and the smallest above the mean (or else the largest) always stay. Of the budget, embeddings and
    head, of the shapes and with the menus `outside`, may take the least or the most.
    """
    taken = [[stored_bytes(t, shape) for t in menu] for shape, menu in outside]
    weights = sum(out * columns for out, columns in shapes.values())
    low, high = (8 * (budget - sum(map(extreme, taken))) / weights for extreme in (max, min))
    near = {}
    for name, menu in menus.items():
        above = min((t for t in menu if bits(t) > high), key=bits, default=max(menu, key=bits))
        always = {min(menu, key=bits), above}
        near[name] = [t for t in menu if t in always or low - _SPAN[0] <= bits(t) <= high + _SPAN[1]]
    return near
