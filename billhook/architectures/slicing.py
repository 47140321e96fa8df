"""Tensors without the parts of units that were removed, and back: with zeros in their place."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from billhook.architectures.units import Unit

Cuts = Mapping[str, Mapping[tuple[int | None, int], Tensor]]  # by tensor: (expert, dim) -> removed indices, sorted


def cuts_of(units: Iterable[Unit], kept: Mapping[str, Tensor]) -> Cuts:
    """What goes from each tensor, for `kept` bool [parts] by the names of units; units not named stay whole."""
    gone: dict[str, dict[tuple[int | None, int], list[Tensor]]] = {}
    for unit in units:
        if unit.name in kept:
            keep = kept[unit.name].cpu()
            for s in unit.slices:
                gone.setdefault(s.tensor, {}).setdefault((s.expert, s.dim), []).append(s.index[~keep].flatten())
    return {
        tensor: {place: torch.cat(parts).sort().values for place, parts in places.items()}
        for tensor, places in gone.items()
    }


def without(name: str, value: Tensor, cuts: Cuts) -> Tensor:
    """A tensor of this name without what was removed."""
    for dim, index in _kept(name, value.shape, cuts):
        if index.ndim == 1:
            value = value.index_select(dim, index.to(value.device))
        else:
            each = zip(value, index.to(value.device), strict=True)
            value = torch.stack([entry.index_select(dim, keep) for entry, keep in each])
    return value


def zeroed(name: str, value: Tensor, cuts: Cuts) -> Tensor:
    """A tensor of this name with zeros where something was removed; experts may lose different numbers of parts."""
    value = value.clone()
    for (expert, dim), gone in cuts.get(name, {}).items():
        (value if expert is None else value[expert]).index_fill_(dim, gone.to(value.device), 0)
    return value


def with_zeros(name: str, value: Tensor, shape: torch.Size, cuts: Cuts) -> Tensor:
    """A tensor that `without` returned, in its old `shape`, with zeros where something was removed."""
    for dim, index in reversed(_kept(name, shape, cuts)):
        whole = list(value.shape)
        if index.ndim == 1:
            whole[dim] = shape[dim]
            value = value.new_zeros(whole).index_copy(dim, index.to(value.device), value)
        else:
            whole[dim + 1] = shape[dim + 1]
            each = zip(value.new_zeros(whole), index.to(value.device), value, strict=True)
            value = torch.stack([zeros.index_copy(dim, keep, entry) for zeros, keep, entry in each])
    return value


def _kept(name: str, shape: torch.Size, cuts: Cuts) -> list[tuple[int, Tensor]]:
    """What stays: (dimension, indices [n]), or (dimension of each expert, indices [experts, n]); experts go last."""
    places, found = cuts.get(name, {}), list[tuple[int, Tensor]]()
    for dim in dict.fromkeys(dim for expert, dim in places if expert is not None):
        each = [places.get((expert, dim), torch.empty(0, dtype=torch.int64)) for expert in range(shape[0])]
        found.append((dim, torch.stack([_others(shape[dim + 1], gone) for gone in each])))
    return found + [(dim, _others(shape[dim], gone)) for (expert, dim), gone in places.items() if expert is None]


def _others(length: int, gone: Tensor) -> Tensor:
    stays = torch.ones(length, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero()[:, 0]
