"""Metadata, tokenizer and names of tensors from a GGUF file that llama.cpp's converter made of the same model.

For an architecture whose names and row orders Billhook does not know, the rows of each tensor in the file are looked up
among the rows of the quantized tensors: a row came from where its numbers are found again. Tensors whose rows are not
found are copied from the file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from billhook.errors import BillhookError
from billhook.export.gguf_writer import Entry, byte_shape
from billhook.store.gguf_file import GgufEntry, GgufFile

if TYPE_CHECKING:
    from gguf import GGUFWriter

_OWN = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
Quantized = Mapping[str, tuple[str, np.ndarray]]  # name on disk -> type, bytes uint8 [..., out, n]
Values = Callable[
    [str, str], Iterable[np.ndarray]
]  # name on disk, type -> bytes of its rows, uint8 [rows, n], in parts


def copy_metadata(writer: "GGUFWriter", template: GgufFile) -> None:
    """Copy the metadata, except what follows from the tensors."""
    from gguf import GGUFValueType

    for key, found in template.metadata.items():
        own = key in _OWN or key.startswith("billhook.")
        if not own and (found.element is None or found.value):  # the writer cannot write an empty list
            element = None if found.element is None else GGUFValueType(found.element)
            writer.add_key_value(key, found.value, GGUFValueType(found.type), element)


def matched_entries(template: GgufFile, quantized: Quantized, values: Values) -> list[Entry]:
    """The tensors of the template, with packed rows in the place of those of the `quantized` tensors.

    Raises BillhookError for a quantized tensor that is not in the template, and for a tensor of the template that would
    have rows of several types.
    """
    names = list(quantized)
    kinds = {entry.type for entry in template.tensors.values() if len(entry.shape) > 1}
    known = {kind: [_digests(part) for name in names for part in values(name, kind)] for kind in kinds}
    counts = [int(np.prod(quantized[name][1].shape[:-1])) for name in names]
    owners, rows = np.repeat(np.arange(len(names)), counts), np.concatenate([np.arange(n) for n in (*counts, 0)])
    tables = {kind: np.concatenate([*digests, np.empty(0, np.uint64)]) for kind, digests in known.items()}
    order = {kind: np.argsort(table, kind="stable") for kind, table in tables.items()}
    entries, used = [], set[int]()
    for entry in template.tensors.values():
        parts: Callable[[], Iterable[np.ndarray]] = partial(_copied, template, entry)
        kind, places = entry.type, None
        if len(entry.shape) > 1:
            places = _find(_digests(template.raw(entry)), tables[kind], order[kind])
        if places is not None:
            used |= set(owners[places].tolist())
            kind = _one_type(entry, {quantized[names[owner]][0].lower() for owner in set(owners[places].tolist())})
            parts = partial(_packed, quantized, names, owners[places], rows[places])
        entries.append(Entry(entry.name, kind, entry.shape, parts))
    for owner, name in enumerate(names):
        if owner not in used:
            raise BillhookError(f"The rows of {name} are not in {template.path}: make that file from this model.")
    return entries


def _one_type(entry: GgufEntry, kinds: set[str]) -> str:
    if len(kinds) > 1:
        raise BillhookError(f"{entry.name} is made of several weights, which must share a type: {sorted(kinds)}.")
    kind = kinds.pop()
    byte_shape(entry.name, entry.shape, kind)
    return kind


def _digests(rows: np.ndarray) -> np.ndarray:
    """A number for each row of bytes [..., n], the same for the same bytes: uint64 [rows]."""
    flat = rows.reshape(-1, rows.shape[-1])
    flat = np.ascontiguousarray(np.pad(flat, ((0, 0), (0, -flat.shape[1] % 8)))).view(np.uint64)
    factors = np.random.default_rng(0).integers(1 << 63, size=flat.shape[1], dtype=np.uint64) * 2 + 1
    return (flat * factors).sum(axis=1, dtype=np.uint64)


def _find(wanted: np.ndarray, table: np.ndarray, order: np.ndarray) -> np.ndarray | None:
    """The places of `wanted` in a table that `order` sorts; None unless all are there."""
    places = np.searchsorted(table, wanted, sorter=order)
    found = order[np.minimum(places, len(order) - 1)] if len(order) else order
    return found if len(found) and np.array_equal(table[found], wanted) else None


def _copied(template: GgufFile, entry: GgufEntry) -> Iterator[np.ndarray]:
    yield template.raw(entry)


def _packed(quantized: Quantized, names: list[str], owners: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The packed rows of a tensor, uint8 [rows, n]."""
    packed: np.ndarray | None = None
    for owner in np.unique(owners):
        own = np.asarray(quantized[names[owner]][1], np.uint8)
        own = own.reshape(-1, own.shape[-1])
        if packed is None:
            packed = np.empty((len(rows), own.shape[1]), np.uint8)
        packed[owners == owner] = own[rows[owners == owner]]
    if packed is not None:
        yield packed
