"""Splitting calibration windows: one half gives statistics, the other the loss that plans are chosen by. No window is
in both."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from billhook.distributed.collectives import in_batches
from billhook.errors import BillhookError
from billhook.registry import hint
from billhook.steps.request import Opened, Request
from billhook.text.windows import digest

_TEXT = ("calibration", "samples", "length", "batch_size", "seed")
OPENING = (*_TEXT, "targets", "ignore", "device", "dtype", "trust_remote_code")
LEAST = 4  # windows: two for each half, so that a spread over windows can be told


@dataclass(frozen=True)
class Split:
    """`batches` of calibration ids [batch, length], `heldout` ids [windows, length], and `facts` for the record."""

    batches: list[Tensor]
    heldout: Tensor
    facts: dict[str, Any]


def used_fields(given: Mapping[str, Any], used: Sequence[str], who: str) -> None:
    """Raise BillhookError for a name in `given` that is neither of `OPENING` nor of `used`: nothing asked for is passed
    over."""
    known = [*OPENING, *used]
    for name in given:
        if name in known:
            continue
        if name in ("table", "gradients"):
            raise BillhookError(f"{who} measures on its own half of the calibration windows: leave {name} out.")
        if name == "sampling":
            raise BillhookError(
                f"{who} splits the windows, and those of --sampling papers can overlap: leave sampling out."
            )
        if name in Request.__dataclass_fields__:
            raise BillhookError(f"{who} has no use for {name}: leave it out.")
        raise BillhookError(f"{who} has no field {name!r}.{hint(name, known)} There are: {', '.join(known)}.")


def split_windows(opened: Opened, seed: int) -> Split:
    """Divide a request's windows in two at random with `seed`, windows of equal content counted once.

    Raises BillhookError where fewer than four different windows are left. Packed windows never overlap; those drawn as
    in the papers can, which is why `used_fields` refuses that sampling.
    """
    tokens = opened.calibration
    assert tokens is not None
    rows = tokens.ids.tolist()
    different = list({tuple(row): index for index, row in reversed(list(enumerate(rows)))}.values())
    if len(different) < LEAST:
        raise BillhookError(
            f"{tokens.source}: {len(different)} different windows are too few to split into calibration and "
            "held-out ones; a search needs "
            f"{LEAST} or more. Give more text, more --samples or a smaller --length."
        )
    order = random.Random(seed).sample(sorted(different), len(different))
    half = len(order) // 2
    calibration, heldout = tokens.ids[order[:half]], tokens.ids[order[half:]]
    facts = {
        "source": tokens.source,
        "sampling": tokens.sampling,
        "length": tokens.ids.shape[1],
        "seed": seed,
        "digest": tokens.digest,
        "calibration": {"windows": len(calibration), "digest": digest(calibration)},
        "heldout": {"windows": len(heldout), "digest": digest(heldout)},
    }
    return Split(in_batches(calibration, len(opened.batches[0])), heldout, facts)
