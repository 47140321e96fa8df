"""Split calibration samples in two: trials are pruned with one half and scored on the other, the held-out half."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.distributed.collectives import rows_per_batch
from billhook.engine.batch import LABELS, Batch, main_input, select_rows, split_rows
from billhook.errors import BillhookError
from billhook.images.pixels import digest as digest_of_pixels
from billhook.tasks.base import Samples
from billhook.text.windows import digest as digest_of_ids

LEAST = 4  # rows: two for each half, so that a standard error over rows is defined


@dataclass(frozen=True)
class Split:
    """`batches` to prune with, the `heldout` rows, and `facts` for the record."""

    batches: list[Batch]
    heldout: Batch
    facts: dict[str, Any]


def split_samples(model: PreTrainedModel, samples: Samples, batch_size: int, seed: int) -> Split:
    """Divide samples into two halves at random with `seed`; equal rows count once, so that none is in both halves.

    Raises BillhookError where fewer than `LEAST` different rows are left. Windows that merely overlap are not detected:
    packed sampling draws none.
    """
    ids = main_input(model, samples.batch)
    digest = digest_of_ids if ids.ndim == 2 else digest_of_pixels
    rows = [_bytes(row) for row in split_rows(samples.batch, 1)]
    different = list({row: index for index, row in reversed(list(enumerate(rows)))}.values())
    if len(different) < LEAST:
        raise BillhookError(
            f"{samples.source}: {len(different)} different windows are too few to split into calibration and held-out "
            f"ones; at least {LEAST} are needed. Give more text, more --samples or a smaller --length."
            if ids.ndim == 2
            else f"{samples.source}: {len(different)} different images are too few to split into calibration and "
            f"held-out ones; at least {LEAST} are needed. Give more images and --samples."
        )
    order = random.Random(seed).sample(sorted(different), len(different))
    half = len(order) // 2
    facts = {
        "source": samples.source,
        "sampling": samples.sampling,
        "bos": samples.bos,
        "length": ids.shape[1 if ids.ndim == 2 else -1],
        "seed": seed,
        "digest": samples.digest,
        "calibration": {"windows": half, "digest": digest(ids[order[:half]])},
        "heldout": {"windows": len(order) - half, "digest": digest(ids[order[half:]])},
    }
    calibration, heldout = (select_rows(samples.batch, torch.tensor(part)) for part in (order[:half], order[half:]))
    return Split(split_rows(calibration, rows_per_batch(half, batch_size)), heldout, facts)


def _bytes(row: Batch) -> bytes:
    """The values of all inputs of a row."""
    return b"".join(row[name].contiguous().cpu().numpy().tobytes() for name in row if name != LABELS)
