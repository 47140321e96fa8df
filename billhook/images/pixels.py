"""From pictures to pixel values, by the image processor of the checkpoint."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError, first_line
from billhook.images.corpus import Picture
from billhook.store.checkpoint import quiet
from billhook.store.files import in_one_line, untrusted

GIVEN = "given pixel values"
_NAMES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Reader:
    """Makes pixel values float32 [n, channels, height, width] of pictures; `processor` is that of the checkpoint."""

    processor: Any

    @classmethod
    def of(cls, directory: Path | None, trust_remote_code: bool, source: str) -> "Reader":
        """The reader of a model directory; raises BillhookError as `processor_of` does."""
        return cls(processor_of(directory, trust_remote_code, source, "AutoImageProcessor"))

    def pixels(self, found: Sequence[Picture]) -> Tensor:
        """The pixel values of the pictures; raises BillhookError, naming the picture, for one of another size."""
        rows: list[Tensor] = []
        for picture in found:
            image = picture.load()
            try:
                made = self.processor(image, return_tensors="pt")["pixel_values"][0]
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                why = first_line(error)
                raise BillhookError(f"{picture.name}: the model's image processor cannot read it ({why}).") from None
            if rows and made.shape != rows[0].shape:
                sizes = f"{list(made.shape)}, the first image {list(rows[0].shape)}"
                raise BillhookError(f"{picture.name} becomes {sizes}: the model's image processor must give one size.")
            rows.append(made.float())
        return torch.stack(rows)


def processor_of(directory: Path | None, trust_remote_code: bool, source: str, auto_class: str) -> Any:
    """The processor of a model directory, by one of transformers' Auto classes.

    Raises BillhookError where there is none, a damaged one, or one that needs a package that is not installed, which
    the message names.
    """
    if directory is None or not any((directory / name).is_file() for name in _NAMES):
        who = "The model" if directory is None else str(directory)
        lack = f"{who} has no processor (preprocessor_config.json) to read {source} with"
        raise BillhookError(f"{lack}: add it, or give the model's inputs as tensors.")
    import transformers

    who = f"The processor of {directory}"
    with untrusted(f"{who} cannot be loaded", "Repair preprocessor_config.json, or copy it again."), quiet():
        try:
            kind = getattr(transformers, auto_class)
            return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        except ImportError as error:
            raise BillhookError(f"{who} needs a package that is missing: {in_one_line(error)}.") from None


def drawn(
    found: Sequence[Any], samples: int, held_out: int, seed: int, source: str, *, again: bool, what: str = "images"
) -> list[int]:
    """The numbers of `samples` random pictures or questions and, where there are as many, of `held_out` more.

    `again` draws the samples with replacement, as the published code does. Raises BillhookError for too few pictures.
    """
    order = random.Random(seed)
    if again:
        return [order.randrange(len(found)) for _ in range(samples)]
    if len(found) < samples:
        raise BillhookError(f"{source} has {len(found)} {what}, fewer than {samples}: use --samples {len(found)}.")
    count = samples + held_out if len(found) >= samples + held_out else samples
    return order.sample(range(len(found)), count)


def digest(pixels: Tensor) -> str:
    """SHA-256 of pixel values: the shape, then the values as little-endian float32."""
    shape = np.array(pixels.shape, dtype="<i8").tobytes()
    return hashlib.sha256(shape + pixels.float().cpu().numpy().astype("<f4").tobytes()).hexdigest()


def checked(pixels: Any, who: str) -> Tensor:
    """Pixel values given from Python; raises BillhookError for another shape or type, or values that are not finite."""
    if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not len(pixels) or not pixels.is_floating_point():
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
        raise BillhookError(f"{who}: pixel values must be floats [n, channels, height, width], found {found}.")
    if not bool(torch.isfinite(pixels).all()):
        raise BillhookError(f"{who}: the pixel values hold NaN or infinity.")
    return pixels.clone() if pixels.is_inference() else pixels
