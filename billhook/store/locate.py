"""Locate each layer in the files: `transformers` may rename, split, fuse or transpose weights between disk and memory.

The location is found by experiment: every row of every layer gets a number, and the numbers go through the same reverse
conversion as weights that are saved; the rows are where their numbers come out. The numbered tensors have only two
columns, so this is cheap for models of any size.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel

_STEP = 1 << 32  # distance of the numbers of two layers: larger than any number of rows or value of an integer buffer
_COLUMNS = 2  # the fewest that show whether a tensor is transposed

Layers = Mapping[str, Mapping[str, Any]]


def to_disk(model: PreTrainedModel, state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Tensors by their names in memory, converted back to those on disk; `names` are the names found there.

    A checkpoint of the bare decoder lacks the prefix of its names (`h.0...` for `transformer.h.0...`), and one with a
    head has it where the model has none: `transformers` changes that while loading and, unlike its other conversions,
    does not reverse it.
    """
    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    prefix = f"{model.base_model_prefix}."

    def stored(name: str) -> str:
        return next((x for x in (name, name.removeprefix(prefix), prefix + name) if x in names), name)

    return {stored(name): tensor for name, tensor in reverted.items()}


def locate_on_disk(model: PreTrainedModel, layers: Layers, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The place of each layer among the tensors `names` on disk, given its place in memory (`tensor`, `index`,
    `transposed`, and `rows` [from, to] of it for a group of a convolution).

    A place is {"tensor", "index", "transposed"}: the layer is that tensor (entry `index` of its first dimension), [in,
    out] if transposed; or {"pieces": [...]}, such places with "rows" [from, to] that make up the layer, in the order of
    its rows ("shuffled" if the rows of a piece are not in this order); or {"tensor": None} where the conversion cannot
    be reversed.
    """
    pieces: dict[str, list[tuple[int, dict[str, Any]]]] = {name: [] for name in layers}
    try:
        numbered = to_disk(model, {**model.state_dict(), **_numbered(model, layers)}, names)
    except (RuntimeError, ValueError, IndexError):  # a conversion that depends on the real number of columns
        return {name: {"tensor": None} for name in layers}
    order = list(layers)
    for tensor, values in numbered.items():
        if not values.is_meta and values.dtype == torch.int64 and values.numel() and int(values.max()) >= _STEP:
            for number, first, piece in _pieces(tensor, values):
                pieces[order[number - 1]].append((first, piece))
    return {name: _place(found) for name, found in pieces.items()}


def _numbered(model: PreTrainedModel, layers: Layers) -> dict[str, Tensor]:
    """The parameters of layers with numbered rows: int64 n * _STEP + r for row r of layer n (from 1), 0 for no
    layer."""
    rows: dict[str, dict[int | None, Tensor]] = {}
    for number, facts in enumerate(layers.values(), start=1):
        values, found = number * _STEP + torch.arange(facts["shape"][0]), rows.setdefault(facts["tensor"], {})
        if span := facts.get("rows"):
            whole = torch.zeros(len(model.get_parameter(facts["tensor"])), dtype=torch.int64)
            found.setdefault(None, whole)[slice(*span)] = values
        else:
            found[facts["index"]] = values
    transposed = {facts["tensor"]: facts["transposed"] for facts in layers.values()}
    numbered = {}
    for name, found in rows.items():
        if None in found:
            values = found[None]
        else:
            empty = torch.zeros_like(next(iter(found.values())))
            values = torch.stack([found.get(expert, empty) for expert in range(model.get_parameter(name).shape[0])])
        wide = values.unsqueeze(-1).expand(*values.shape, _COLUMNS)
        numbered[name] = wide.transpose(-1, -2) if transposed[name] else wide
    return numbered


def _pieces(tensor: str, values: Tensor) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The layer's number, its first row, and the place of each run of rows of one layer in a tensor on disk."""
    for index, matrix in enumerate(values) if values.ndim == 3 else [(None, values)]:
        transposed = matrix.shape[1] != _COLUMNS or not bool((matrix[:, 0] == matrix[:, 1]).all())
        rows = matrix[0] if transposed else matrix[:, 0]
        start = 0
        runs = torch.unique_consecutive(rows // _STEP, return_counts=True)
        for number, count in zip(*(x.tolist() for x in runs), strict=True):
            if number:
                span = [start, start + count] if count < len(rows) else None
                piece = {"tensor": tensor, "index": index, "transposed": transposed, "rows": span}
                own = rows[start : start + count] % _STEP
                shuffled = {} if bool((own.diff() == 1).all()) else {"shuffled": True}
                yield number, int(own[0]), piece | shuffled
            start += count


def _place(found: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    pieces = [piece for _, piece in sorted(found, key=lambda x: x[0])]
    if len(pieces) == 1 and pieces[0]["rows"] is None:
        return {key: value for key, value in pieces[0].items() if key != "rows"}
    return {"pieces": pieces} if pieces else {"tensor": None}
