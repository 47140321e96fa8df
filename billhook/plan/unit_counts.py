"""How many parts of each unit stay, for a fraction of the parameters of a model's blocks. No torch.

In a uniform shape every unit of a kind keeps the same number. Coarse kinds (heads, experts) are rounded to whole parts
first; channels, in steps of a quantum, take what is left, so the total is met to within one quantum. In a shape with
numbers per layer, each unit loses its fraction in steps of its own, rounded by largest remainder to the same total.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from billhook.errors import BillhookError
from billhook.plan.budget import scale_to, whole_numbers

Shape = Literal["uniform", "per-layer"]  # of the smaller model: whether its blocks may differ
QUANTA = (64, 32, 8)  # the first that divides a width and is not a large part of it; storage types need 32
_STEPS = 8  # of a quantum in a width, at least


@dataclass(frozen=True)
class Size:
    """A unit's `name`, `kind`, `block`, number of parts, and `parameters` in each of them; at least `least` stay.

    `inside` names the experts of which the unit is one, if they are units too: what it loses counts only if it stays.
    """

    name: str
    kind: str
    block: int
    count: int
    parameters: int
    least: int = 1
    inside: str = ""

    @property
    def n(self) -> int:
        """All its parameters."""
        return self.count * self.parameters

    @property
    def step(self) -> int:
        """How many parts are removed at once."""
        return quantum(self.count) if self.kind == "channels" else 1

    @property
    def steps(self) -> int:
        """How many steps can go."""
        return (self.count - self.least) // self.step


def quantum(count: int) -> int:
    """The step in which channels are removed: the first of 64, 32 and 8 of which there are at least eight, else 1."""
    return next((q for q in QUANTA if count % q == 0 and count >= _STEPS * q), 1)


def uniform_counts(sizes: Sequence[Size], remove: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Parts that stay, by unit, the same number in every unit of a kind and size, where `remove` parameters go in all.

    `shares` are the kinds' parts in that, which sum to 1. Where units of a kind have different sizes, such as the MLPs
    of dense blocks and those of experts, each size loses the same fraction. Raises BillhookError where a kind would
    lose everything.
    """
    kept, left, rounding = dict[str, int](), float(remove), 0.0
    alike: dict[tuple[str, int], list[Size]] = {}
    for s in sizes:
        alike.setdefault((s.kind, s.count), []).append(s)
    totals = {kind: sum(s.n for s in sizes if s.kind == kind) for kind in shares}
    finest = sorted(alike, key=lambda key: (key[0] == "channels", -alike[key][0].step))  # small steps take what is left
    for kind, count in finest:
        units = alike[kind, count]
        last = kind == "channels" and (kind, count) == finest[-1]
        wanted = max(left, 0.0) if last else remove * shares[kind] * sum(s.n for s in units) / totals[kind]
        stays = {s.name: kept[s.name] / s.count for s in sizes if s.name in kept}
        per_step = units[0].step * sum(s.parameters * stays.get(s.inside, 1.0) for s in units)
        most, steps = int(units[0].steps * per_step), round(wanted / per_step)
        if steps > units[0].steps and wanted - most > rounding:
            raise _too_much(kind, wanted, most, units[0].least)
        steps = min(steps, units[0].steps)
        left, rounding = left - steps * per_step, rounding + per_step / 2
        kept |= {s.name: s.count - steps * s.step for s in units}
    return kept


def per_layer_counts(sizes: Sequence[Size], remove: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Parts that stay, by unit, where each loses about its fraction and `remove` parameters go in all.

    The fractions are scaled until they fit, and the total is met to within half a step of the unit with the smallest
    steps that can still give or take. Raises BillhookError where the units cannot give that much.
    """
    steps = [s.steps for s in sizes]
    units = [s.step * s.parameters for s in sizes]
    room = [k * unit for k, unit in zip(steps, units, strict=True)]
    check_room(sizes, remove)
    open_ = [i for i in range(len(sizes)) if room[i]]
    raw = [fractions[sizes[i].name] * sizes[i].n / room[i] for i in open_]
    if remove and not any(raw):
        raise BillhookError("The allocation removes nothing from any unit that has something to give.")
    gone = scale_to(raw, [room[i] for i in open_], remove / sum(room)) if remove else [0.0] * len(open_)
    exact = [0.0] * len(sizes)
    for i, share in zip(open_, gone, strict=True):
        exact[i] = share * steps[i]
    whole = whole_numbers(exact, steps, units)
    return {s.name: s.count - k * s.step for s, k in zip(sizes, whole, strict=True)}


def check_room(sizes: Sequence[Size], remove: int) -> None:
    """Raise BillhookError where units of these sizes cannot give `remove` parameters."""
    most = sum(s.steps * s.step * s.parameters for s in sizes)
    if remove > most:
        raise _too_much(" and ".join(_kinds(sizes)), remove, most, max(s.least for s in sizes))


def _too_much(kinds: str, wanted: float, most: int, least: int = 1) -> BillhookError:
    if not most:
        stays = "one must stay in every block" if least == 1 else f"every token goes to {least} experts"
        return BillhookError(f"No {kinds} can go, because {stays}: name other kinds of units.")
    what = "nothing of them:" if least == 1 else f"too few: every token goes to {least} experts;"
    return BillhookError(
        f"Removing {wanted:,.0f} parameters from {kinds} would leave {what} at most {most:,} can go, "
        f"{most / wanted:.1%} of that. Remove less, or from more kinds of units."
    )


def shares_of(sizes: Sequence[Size], fractions: Mapping[str, float]) -> dict[str, float]:
    """The share of each kind in what is removed, where each unit loses its fraction."""
    gone = {kind: sum(fractions[s.name] * s.n for s in sizes if s.kind == kind) for kind in _kinds(sizes)}
    whole = sum(gone.values())
    return {kind: value / whole for kind, value in gone.items()} if whole else proportional(sizes, _kinds(sizes))


def _kinds(sizes: Sequence[Size]) -> list[str]:
    return list(dict.fromkeys(s.kind for s in sizes))


def proportional(sizes: Sequence[Size], kinds: Sequence[str]) -> dict[str, float]:
    """The share of each kind in what is removed, in proportion to its parameters."""
    totals = {kind: sum(s.n for s in sizes if s.kind == kind) for kind in kinds}
    return {kind: totals[kind] / sum(totals.values()) for kind in kinds}
