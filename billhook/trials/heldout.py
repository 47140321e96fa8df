"""Splitting calibration windows in two: one half gives the statistics of a trial, the other the loss it is scored
by."""

import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from billhook.distributed.collectives import in_batches
from billhook.errors import BillhookError
from billhook.text.windows import Tokens, digest

LEAST = 4  # windows: two for each half, so that a standard error over windows is defined


@dataclass(frozen=True)
class Split:
    """`batches` of calibration ids [batch, length], held-out ids [windows, length], and `facts` for the record."""

    batches: list[Tensor]
    heldout: Tensor
    facts: dict[str, Any]


def split_windows(tokens: Tokens, batch_size: int, seed: int) -> Split:
    """Divide windows into two halves at random with `seed`; equal windows count once, so that none is in both halves.

    Raises BillhookError where fewer than `LEAST` different windows are left. Windows that merely overlap are not
    detected: packed sampling draws none.
    """
    rows = tokens.ids.tolist()
    different = list({tuple(row): index for index, row in reversed(list(enumerate(rows)))}.values())
    if len(different) < LEAST:
        raise BillhookError(
            f"{tokens.source}: {len(different)} different windows are too few to split into calibration and held-out "
            f"ones; at least {LEAST} are needed. Give more text, more --samples or a smaller --length."
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
    return Split(in_batches(calibration, batch_size), heldout, facts)
