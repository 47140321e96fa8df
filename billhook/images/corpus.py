"""From a SOURCE to a list of pictures, without torch.

FOLDER                          images (.jpg, .png, .webp, ...) directly inside it, or in folders named by their labels
FILE.npz                        `x` uint8 [n, height, width] or [n, height, width, 3], and, if known, `y` [n] labels
hub:NAME[:config][:split]       a dataset of the Hugging Face hub or a local one, with a column of images
                                (`image` or `img`) and, if known, one of labels (`label` or `labels`)
rows given from Python          images of Pillow, or mappings with `image` and perhaps `label`

Hidden files and folders are not read. An image is opened when it is needed, turned as its EXIF data say, and converted
to RGB with 8 bits: grey ones are repeated, an alpha channel is dropped. One that cannot be read, or that has more
pixels than Pillow accepts (89 million), is refused by name, or left out by `readable`.
"""

import hashlib
import logging
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np

from billhook.errors import BillhookError, first_line
from billhook.text.hub import hub_rows

_EIGHT, _SIXTEEN = 255, 65535  # the largest pixels of so many bits; 257 steps of the second are one of the first
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}  # names of folders
_NAMED = 10  # images that are named where more are left out
_SKIP = "--skip-unreadable leaves out such images of a SOURCE"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMS = "a folder of images (labels are the names of its folders), FILE.npz with x and y, or hub:NAME[:config][:split]"
T = TypeVar("T")
_IMAGE, _LABEL = ("image", "img"), ("label", "labels", "fine_label")


class Unreadable(BillhookError):
    """An image that cannot be read."""


@dataclass(frozen=True)
class Picture:
    """An image that is not opened yet; `label` is a class number, the name of a class, or None where it is unknown."""

    name: str
    open: Callable[[], Any]
    label: int | str | None = None

    def load(self) -> Any:
        """The image of Pillow, in RGB; raises BillhookError, with its name, where it cannot be read."""
        image_module = pillow()
        from PIL import ImageOps

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", image_module.DecompressionBombWarning)
                image = self.open()
                image.load()
                return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
        except (image_module.DecompressionBombWarning, image_module.DecompressionBombError):
            most = f"more than {image_module.MAX_IMAGE_PIXELS:,} pixels"
            raise Unreadable(f"{self.name} has {most}: make it smaller or remove it; {_SKIP}.") from None
        except BillhookError:
            raise
        except Exception as error:  # Pillow raises a dozen unrelated kinds for damaged files
            why = first_line(error)
            found = f"{self.name} cannot be read as an image ({why})"
            raise Unreadable(f"{found}: repair or remove it; {_SKIP}.") from None


def _eight_bits(image: Any) -> Any:
    """The image with 8 bits a channel, which Pillow would cut off at 255 instead; raises ValueError for pixels of an
    unknown range."""
    if not image.mode.startswith(("I", "F")):
        return image
    low, high = image.getextrema()
    if image.mode == "F" or low < 0 or high > _SIXTEEN:
        raise ValueError(f"its pixels are {image.mode} from {low:g} to {high:g}, not 8 or 16 bits")
    deep = image.mode.startswith("I;16") or high > _EIGHT
    pixels = np.asarray(image) // (_EIGHT + 2) if deep else np.asarray(image)
    return pillow().fromarray(pixels.astype(np.uint8))


def pillow() -> Any:
    """Pillow's module Image; raises BillhookError where it is not installed."""
    try:
        from PIL import Image
    except ImportError:
        raise BillhookError("Images are read by the package Pillow: pip install 'billhook[vision]'.") from None
    return Image


def pictures(source: Any, purpose: str) -> list[Picture]:
    """The pictures of a SOURCE or of rows given from Python.

    `purpose`, calibration or evaluation, decides the default split of a hub dataset. Raises BillhookError for a source
    of another kind, and for one without images.
    """
    if not isinstance(source, str | Path):
        return _rows(source, purpose)
    pillow()
    if str(source).startswith("hub:"):
        return _rows(hub_rows(str(source), purpose), str(source))
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return _arrays(path)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return [_file(path, None)]
    why = "there is no such file or folder" if not path.exists() else "it holds no images"
    raise BillhookError(f"{source}: {why}, and the model reads images. A source of images is {FORMS}.")


def readable(every: Sequence[T], pictures_of: Callable[[T], Sequence[Picture]], source: str) -> list[T]:
    """Those of the images or questions of a SOURCE whose pictures can be read; the others are logged.

    Opens every picture. Raises BillhookError where none can be read.
    """
    found, reasons = [], []
    for one in every:
        try:
            for picture in pictures_of(one):
                picture.load()
            found.append(one)
        except Unreadable as error:
            reasons.append(str(error).partition(": ")[0])
    if not found:
        raise BillhookError(f"{source}: none of {len(every)} images can be read ({reasons[0]}).")
    if reasons:
        named = "; ".join(reasons[:_NAMED]) + ("; ..." if len(reasons) > _NAMED else "")
        logging.getLogger(__name__).warning("note: %d of %d were left out: %s.", len(reasons), len(every), named)
    return found


def digest(found: Sequence[Picture]) -> str:
    """SHA-256 over the pixels of the pictures, in order."""
    total = hashlib.sha256()
    for picture in found:
        pixels = np.asarray(picture.load())
        total.update(np.array(pixels.shape, dtype="<i8").tobytes() + pixels.tobytes())
    return total.hexdigest()


def _folder(path: Path) -> list[Picture]:
    def visible(file: Path) -> bool:
        return not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(path).parts)

    every = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and visible(file)]
    nested = [file for file in every if file.parent != path and file.is_file()]
    found = [_file(file, file.relative_to(path).parts[0]) for file in nested]
    loose = [_file(file, None) for file in every if file.parent == path]
    splits = {str(picture.label) for picture in found}
    if splits and splits <= _SPLITS and all(file.parent.parent != path for file in nested):
        raise BillhookError(f"{path} holds the folders of a split dataset, such as {min(splits)}: give one of these.")
    if found and loose:
        raise BillhookError(f"{path} has images both in folders and beside them, such as {loose[0].name}: move them.")
    if not found and not loose:
        raise BillhookError(f"{path} holds no images ({', '.join(SUFFIXES[:4])}, ...). A source of images is {FORMS}.")
    return found or loose


def _file(path: Path, label: str | None) -> Picture:
    return Picture(str(path), lambda: pillow().open(path), label)


def _arrays(path: Path) -> list[Picture]:
    try:
        with open(path, "rb") as data, np.load(data, allow_pickle=False) as file:
            values = {name: file[name] for name in ("x", "y") if name in file.files}
            names = ", ".join(file.files) or "nothing"
    except (OSError, ValueError, EOFError, KeyError, TypeError, BadZipFile, zlib.error) as error:
        raise BillhookError(f"{path} is not a readable .npz file ({str(error)[:200]}).") from None
    x, y = values.get("x"), values.get("y")
    if x is None or x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[-1] not in (1, 3, 4)):
        found = f"it has {names}" if x is None else f"x is {x.dtype} {list(x.shape)}"
        raise BillhookError(f"{path} needs x, uint8 [n, height, width] or [n, height, width, 3]: {found}.")
    if not len(x):
        raise BillhookError(f"{path} is empty: x has no image.")
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu"):
        raise BillhookError(f"{path}: y must be whole numbers [{len(x)}], found {y.dtype} {list(y.shape)}.")
    x = x[..., 0] if x.ndim == 4 and x.shape[-1] == 1 else x
    labels = [None] * len(x) if y is None else y.tolist()
    opened = (partial(pillow().fromarray, pixels) for pixels in x)
    return [Picture(f"{path}, image {n}", *pair) for n, pair in enumerate(zip(opened, labels, strict=True))]


def _rows(rows: Any, source: str) -> list[Picture]:
    if not isinstance(rows, Iterable) or isinstance(rows, bytes | Mapping):
        raise BillhookError(f"{source}: found {type(rows).__name__}; give {FORMS}, or an iterable of images.")
    names = getattr(rows, "features", None) or {}
    found = []
    for number, row in enumerate(rows, start=1):
        image, label = row, None
        if isinstance(row, Mapping):
            image, label = (next((row[key] for key in keys if key in row), None) for keys in (_IMAGE, _LABEL))
        if not hasattr(image, "convert"):
            raise BillhookError(f"{source}, row {number}: found no image, but {type(image).__name__}. Give images.")
        known: Any = next((names[key] for key in _LABEL if key in names), None)
        label = label.item() if isinstance(label, np.integer) else label
        if isinstance(label, bool) or not isinstance(label, int | str | None):
            raise BillhookError(
                f"{source}, row {number}: a label is a whole number or the name of a class, found {label!r:.40}."
            )
        if isinstance(label, int) and hasattr(known, "int2str"):
            label = known.int2str(label)
        found.append(Picture(f"{source}, row {number}", image.copy, label))
    if not found:
        raise BillhookError(f"{source} is empty: give {FORMS}.")
    return found
