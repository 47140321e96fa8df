"""Levels: the storage types that every tensor of a model can have, their bytes, and what each is expected to lose.

Allocators of levels (`billhook.plan.level_allocators`) read nothing else, so they need no model and no torch. The loss
of tensor l at type v is

    loss_l(v) = c_l · e_l(v)

For a layer e_l(v) is the relative error of its output (`billhook.measurement.level_errors`) and c_l the KL divergence
of the model per relative error (`billhook.racing.levels`); for embeddings and head e_l(v) is the divergence of the
model in which that tensor alone has the type, and c_l is 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.plan.storage import bits, stored_bytes
from billhook.plan.table import Table

Types = dict[str, str]  # by tensor
Errors = Mapping[str, Mapping[str, float]]  # by tensor and type


@dataclass(frozen=True)
class Levels:
    """Types to choose from, under a `budget` of all tensors in bytes.

    * `shapes`: [out, in] of every tensor by name, the layers in the order of the model; those in `outside` are no
      layers but embeddings and head.
    * `menus`: the types that a tensor can have.
    * `tied`: tuples of layers that get the same type, as programs need that fuse them.
    * `errors` and `weights`: e_l(v) and c_l, where they were measured.
    * `table`: the rows of the layers, with the columns that an allocator reads.
    """

    shapes: Mapping[str, tuple[int, int]]
    menus: Mapping[str, Sequence[str]]
    budget: int
    outside: Sequence[str] = ()
    tied: Sequence[tuple[str, ...]] = ()
    errors: Errors = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    table: Table = field(default_factory=lambda: Table(()))

    @cached_property
    def groups(self) -> list[tuple[str, ...]]:
        """All tensors in order, those that are tied together in one tuple."""
        owner = {name: group for group in self.tied for name in group if name in self.shapes}
        return list(dict.fromkeys(owner.get(name, (name,)) for name in self.shapes))

    def menu(self, group: Sequence[str]) -> list[str]:
        """The types that all tensors of a group can have, by bits and name."""
        found = [t for t in self.menus[group[0]] if all(t in self.menus[name] for name in group)]
        return sorted(found, key=lambda t: (bits(t), t))

    def ladder(self, group: Sequence[str]) -> list[tuple[int, str]]:
        """Bytes and types of a group, smallest first; of types of one size the last by name (q3_k, not iq3_s)."""
        return sorted({self.bytes(group, t): t for t in self.menu(group)}.items())

    def weights_in(self, group: Sequence[str]) -> int:
        """The number of weights of a group."""
        return sum(self.shapes[name][0] * self.shapes[name][1] for name in group)

    def bytes(self, names: Sequence[str], type: str) -> int:
        """The bytes of tensors stored as one type."""
        return sum(stored_bytes(type, self.shapes[name]) for name in names)

    def total(self, types: Mapping[str, str]) -> int:
        """The bytes of all tensors."""
        return sum(stored_bytes(types[name], shape) for name, shape in self.shapes.items())

    def loss(self, group: Sequence[str], type: str) -> float:
        """What a group is expected to lose at a type, in nats a token."""
        return math.fsum(self.weights.get(name, 1.0) * self.errors[name][type] for name in group)

    @property
    def least(self) -> int:
        """The bytes of all tensors with their smallest types."""
        return sum(min(self.bytes(group, t) for t in self.menu(group)) for group in self.groups)

    def predicted(self, types: Mapping[str, str]) -> float:
        """The sum of the losses of all tensors."""
        return math.fsum(self.loss([name], types[name]) for name in self.shapes)

    def recorded(self) -> dict[str, Any]:
        """`made_by.levels` and `made_by.tied` of a plan: bytes and errors at every type, and weights, if measured."""
        if not self.errors:
            return {}
        levels = {
            name: {
                "weight": self.weights.get(name, 1.0),
                "types": {t: {"bytes": self.bytes([name], t), "error": e} for t, e in self.errors[name].items()},
            }
            for name in self.shapes
        }
        return {"levels": levels, "tied": [list(group) for group in self.tied]}

    def plan(self, types: Mapping[str, str], made_by: Mapping[str, Any]) -> Plan:
        """The plan of these types; those of embeddings and head are `made_by.outside`."""
        weights = {name: Spec(type=types[name]) for name in self.shapes if name not in self.outside}
        outside = {name: types[name] for name in self.outside}
        return Plan(Budget("bytes", self.budget), weights, made_by={**made_by, "outside": outside})


def types_of(plan: Plan) -> Types:
    """The types of layers, embeddings and head of a plan of storage types."""
    return {name: spec.type or "" for name, spec in plan.weights.items()} | plan.made_by.get("outside", {})
