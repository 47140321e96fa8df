"""How many parts of each unit stay, for a fraction of the parameters of a model's blocks. No torch.

Kinds of units share what is to be removed in proportion to their parameters. Coarse kinds (heads, experts) are rounded
to whole parts first; channels, in steps of a quantum, take what is left, so the total is met to within one quantum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from billhook.errors import BillhookError

QUANTA = (64, 32, 8)  # the first that divides a width and is not a large part of it; storage types need 32
_STEPS = 8  # of a quantum in a width, at least


@dataclass(frozen=True)
class Size:
    """A unit's `name`, `kind`, `block`, number of parts, and `parameters` in each of them."""

    name: str
    kind: str
    block: int
    count: int
    parameters: int


def quantum(count: int) -> int:
    """The step in which channels are removed: the first of 64, 32 and 8 of which there are at least eight, else 1."""
    return next((q for q in QUANTA if count % q == 0 and count >= _STEPS * q), 1)


def uniform_counts(sizes: Sequence[Size], remove: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Parts that stay, by unit, the same number in every unit of a kind, where `remove` parameters go in all.

    `shares` are the kinds' parts in that, which sum to 1. Raises BillhookError where a kind would lose everything.
    """
    kept, left = dict[str, int](), float(remove)
    kinds = sorted(shares, key=lambda kind: kind == "channels")  # channels last: they are the finest
    for number, kind in enumerate(kinds):
        units = [s for s in sizes if s.kind == kind]
        if len({s.count for s in units}) > 1:
            raise BillhookError(f"The {kind} differ in number between blocks, so no uniform shape exists.")
        wanted = left if number + 1 == len(kinds) else remove * shares[kind]
        step = quantum(units[0].count) if kind == "channels" else 1
        per_step = step * sum(s.parameters for s in units)
        gone = step * round(wanted / per_step)
        if gone >= units[0].count:
            most = sum((s.count - step) * s.parameters for s in units)
            raise BillhookError(
                f"Removing {wanted:,.0f} parameters from {kind} would leave nothing of them: at most {most:,} can go. "
                "Remove less, or name more kinds with --units."
            )
        left -= gone // step * per_step
        kept |= {s.name: s.count - gone for s in units}
    return kept


def proportional(sizes: Sequence[Size], kinds: Sequence[str]) -> dict[str, float]:
    """The share of each kind in what is removed, in proportion to its parameters."""
    totals = {kind: sum(s.count * s.parameters for s in sizes if s.kind == kind) for kind in kinds}
    return {kind: totals[kind] / sum(totals.values()) for kind in kinds}
