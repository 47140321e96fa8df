"""Splitting calibration windows: one half gives statistics, the other the loss that plans are chosen by. No window is in both."""

import random
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from billhook.data import digest
from billhook.errors import BillhookError
from billhook.request import Opened

LEAST = 4  # windows: two for each half, so that a spread over windows can be told


@dataclass(frozen=True)
class Split:
    """`batches` of calibration ids [batch, length], `heldout` ids [windows, length], and `facts` for the record."""

    batches: list[Tensor]
    heldout: Tensor
    facts: dict[str, Any]


def split_windows(opened: Opened, seed: int) -> Split:
    """Divide a request's windows in two at random with `seed`, windows of equal content counted once.

    Raises BillhookError where fewer than four different windows are left. Packed windows never overlap; those drawn as in the papers
    can, which is why a search does not offer that sampling.
    """
    tokens = opened.calibration
    assert tokens is not None
    if tokens.sampling == "papers":
        raise BillhookError("A search splits the calibration windows, and those of --sampling papers can overlap: use --sampling packed.")
    rows = tokens.ids.tolist()
    different = list({tuple(row): index for index, row in reversed(list(enumerate(rows)))}.values())
    if len(different) < LEAST:
        raise BillhookError(
            f"{tokens.source}: {len(different)} different windows are too few to split into calibration and held-out ones; a search needs "
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
    return Split(list(calibration.split(len(opened.batches[0]))), heldout, facts)
