"""Pixel values and class numbers from a SOURCE of images, for tasks whose inputs are images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.engine.batch import LABELS, Batch
from billhook.errors import BillhookError
from billhook.images.corpus import Picture, pictures, readable
from billhook.images.labels import UNKNOWN, class_numbers
from billhook.images.pixels import GIVEN, Reader, checked, digest, drawn
from billhook.tasks.base import Drawing, Home, Samples

ROWS = 64  # images that are read at once


@dataclass(frozen=True)
class Images:
    """The pictures of a SOURCE with their class numbers (None: labels are not read), and their reader.

    `skipped` more cannot be read.
    """

    source: str
    found: list[Picture]
    labels: list[int] | None
    reader: Reader
    skipped: int = 0

    @classmethod
    def of(
        cls, source: Any, home: Home, model: PreTrainedModel, classes: Mapping[int, str] | None, purpose: str
    ) -> "Images":
        """Find the pictures and match their labels with `classes`; raises BillhookError as `billhook.images` does."""
        name = str(source) if isinstance(source, str | Path) else "given images"
        every = pictures(source, purpose)
        found = readable(every, lambda picture: (picture,), name) if home.skip_unreadable else every
        labels = None if classes is None else class_numbers(found, classes, name)
        directory = home.directory_of(model)
        reader = Reader.of(directory, home.trust_remote_code, name)
        return cls(name, found, labels, reader, len(every) - len(found))

    def batch(self, numbers: list[int]) -> Batch:
        """Pixel values float32 and class numbers of some pictures."""
        batch: dict[str, Tensor] = {"pixel_values": self.reader.pixels([self.found[n] for n in numbers])}
        if self.labels is not None:
            batch[LABELS] = torch.tensor([self.labels[n] for n in numbers])
        return batch

    def batches(self, limit: int | None, rows: int = ROWS) -> Iterator[Batch]:
        """All pictures in their order, or the first `limit`, read a few at a time."""
        numbers = list(range(len(self.found)))[:limit]
        for start in range(0, len(numbers), rows):
            yield self.batch(numbers[start : start + rows])


def image_samples(
    source: Any, model: PreTrainedModel, home: Home, drawing: Drawing, classes: Mapping[int, str] | None
) -> Samples:
    """Calibration images of a SOURCE, at random, and more of them that are held out; tensors of pixel values (or
    batches with labels) are used as they are.

    Raises BillhookError as `billhook.images` does, and for an option that only windows of text have.
    """
    if drawing.length is not None or drawing.bos != "auto":
        raise BillhookError("Images are no windows of tokens: leave out --length and --bos.")
    if isinstance(source, Tensor | Mapping):
        return _given(source, classes)
    images = Images.of(source, home, model, classes, "calibration")
    papers = drawing.sampling == "papers"
    samples = drawing.samples_of(len(images.found))
    numbers = drawn(images.found, samples, drawing.held_out, drawing.seed, images.source, again=papers)
    batch = images.batch(numbers)
    return Samples.split(batch, samples, model, images.source, drawing.sampling, skipped=images.skipped)


def _given(source: Tensor | Mapping[str, Any], classes: Mapping[int, str] | None) -> Samples:
    given = {"pixel_values": source} if isinstance(source, Tensor) else dict(source)
    batch: dict[str, Tensor] = {"pixel_values": checked(given.get("pixel_values"), "calibration")}
    if classes is not None:
        labels = given.get(LABELS)
        unknown = torch.full((len(batch["pixel_values"]),), UNKNOWN)
        batch[LABELS] = unknown if labels is None else checked_labels(labels, len(unknown), classes)
    return Samples(batch, GIVEN, digest(batch["pixel_values"]), "given")


def checked_labels(labels: Any, rows: int, classes: Mapping[int, str]) -> Tensor:
    """Class numbers int64 [rows]; raises BillhookError for others, or one that the model does not have."""
    found = torch.as_tensor(labels)
    if found.shape != (rows,) or found.is_floating_point():
        raise BillhookError(f"labels must be {rows} whole numbers, found {found.dtype} {list(found.shape)}.")
    if bool(((found < UNKNOWN) | (found >= len(classes))).any()):
        raise BillhookError(f"labels hold {int(found.max())}, and the model has {len(classes)} classes.")
    return found.to(torch.int64)
