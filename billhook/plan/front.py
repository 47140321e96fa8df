"""The front of a compressed model: predicted loss against bytes, from what was measured for its plan. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum

from billhook.errors import BillhookError
from billhook.plan.knapsack import choose_levels
from billhook.plan.levels import types_of
from billhook.plan.plan import Plan
from billhook.plan.storage import bits
from billhook.store.typed_json import typed

BUDGETS = 24


@dataclass(frozen=True)
class Level:
    """A tensor as a type: its `bytes`, and its relative `error`."""

    bytes: int
    error: float


@dataclass(frozen=True)
class Measured:
    """A tensor: the divergence that an error of 1 costs, and its levels by type."""

    weight: float
    types: dict[str, Level]


@dataclass(frozen=True)
class Front:
    """Bytes of the quantized tensors, and the sum of their predicted losses in nats a token.

    `best` are the optima of `curves` for budgets from the smallest to the largest types, `uniform` those of one type
    everywhere, by its name (a tensor that cannot have it gets the next larger one), and `chosen` those of the plan.
    """

    best: list[tuple[int, float]]
    uniform: dict[str, tuple[int, float]]
    chosen: tuple[int, float]


def measured_levels(plan: Plan) -> dict[str, Measured]:
    """What was measured for a plan, by tensor; raises BillhookError for a plan without measured levels."""
    if not plan.made_by.get("levels"):
        raise BillhookError("The plan holds no levels: compress keeps them with --allocator curves, rco or auto.")
    return typed(dict[str, Measured], plan.made_by["levels"], "made_by.levels")


def front(plan: Plan) -> Front:
    """The front of a plan; raises BillhookError for a plan without measured levels."""
    levels = measured_levels(plan)
    tied: list[list[str]] = typed(list[list[str]], plan.made_by.get("tied") or [], "made_by.tied")
    owner = {name: tuple(group) for group in tied for name in group if name in levels}
    groups = list(dict.fromkeys(owner.get(name, (name,)) for name in levels))
    menus = [[t for t in levels[g[0]].types if all(t in levels[name].types for name in g)] for g in groups]
    if not all(menus):
        raise BillhookError("made_by.levels: tied tensors have no type in common.")
    costs = [[_total(levels, dict.fromkeys(g, t))[0] for t in menu] for g, menu in zip(groups, menus, strict=True)]
    losses = [[_total(levels, dict.fromkeys(g, t))[1] for t in menu] for g, menu in zip(groups, menus, strict=True)]
    least, most = (sum(map(extreme, costs)) for extreme in (min, max))
    best = []
    for k in range(BUDGETS + 1):
        chosen = choose_levels(costs, losses, least + (most - least) * k // BUDGETS)
        types = {name: menu[j] for g, menu, j in zip(groups, menus, chosen, strict=True) for name in g}
        best.append(_total(levels, types))
    names = sorted({t for menu in menus for t in menu}, key=lambda t: (bits(t), t))
    uniform = {}
    for type in names:
        near = [type if type in menu else _next(menu, type) for menu in menus]
        uniform[type] = _total(levels, {name: t for g, t in zip(groups, near, strict=True) for name in g})
    return Front(best, uniform, _total(levels, types_of(plan)))


def _total(levels: Mapping[str, Measured], types: Mapping[str, str]) -> tuple[int, float]:
    """Bytes and loss of tensors."""
    found = [(levels[name].weight, levels[name].types.get(type)) for name, type in types.items() if name in levels]
    known = [(weight, level) for weight, level in found if level is not None]
    if len(known) < len(types):
        raise BillhookError("The types of the plan are not those whose errors it holds: it was edited.")
    return sum(level.bytes for _, level in known), fsum(weight * level.error for weight, level in known)


def _next(menu: Sequence[str], type: str) -> str:
    """The next larger type of a menu, or else its largest."""
    return min((t for t in menu if bits(t) >= bits(type)), key=bits, default=max(menu, key=bits))
