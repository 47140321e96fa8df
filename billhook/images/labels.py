"""Class numbers of pictures: the names of their labels matched with a model's."""

from collections.abc import Mapping, Sequence

from billhook.errors import BillhookError
from billhook.images.corpus import Picture

UNKNOWN = -1  # the number of a class that is not known


def class_numbers(found: Sequence[Picture], names: Mapping[int, str], source: str) -> list[int]:
    """The class number of each picture, `UNKNOWN` where it has no label; `names` are the model's classes by number.

    A name is matched as it is, then without regard to case, spaces and underscores, then as a number. Where the model
    has no names of its own (LABEL_0, ...) and the source has as many labels as the model classes, these are numbered in
    alphabetical order, as image folders usually are. Raises BillhookError, naming the label, for one that the model
    does not have.
    """
    labels = {picture.label for picture in found}
    numbers = {label: _number(label, names) for label in labels}
    words = sorted(label for label in labels if isinstance(label, str))
    if None in numbers.values() and _unnamed(names) and len(words) == len(labels) == len(names):
        numbers = dict(zip(words, range(len(words)), strict=True))
    for picture in found:
        if numbers[picture.label] is None:
            if (several := [number for number, name in names.items() if name == picture.label])[1:]:
                raise BillhookError(
                    f"{source}: the label {picture.label!r} of {picture.name} is the name of several of the model's "
                    f"classes, {', '.join(map(str, several))}: name its folder by one of these numbers."
                )
            known = f"{len(names)} classes, such as {', '.join(repr(name) for name in list(names.values())[:3])}"
            raise BillhookError(
                f"{source}: the label {picture.label!r} of {picture.name} is none of the model's {known}. "
                "Name the folders after the model's classes (id2label in config.json), or by number."
            )
    return [number for picture in found if (number := numbers[picture.label]) is not None]


def _number(label: int | str | None, names: Mapping[int, str]) -> int | None:
    if label is None:
        return UNKNOWN
    if isinstance(label, int):
        return label if label in names else None
    exact = [number for number, name in names.items() if name == label]
    alike = [number for number, name in names.items() if _plain(label) and _plain(name) == _plain(label)]
    if len(exact or alike) == 1:
        return (exact or alike)[0]
    return int(label) if label.isdecimal() and int(label) in names else None


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _unnamed(names: Mapping[int, str]) -> bool:
    return all(name == f"LABEL_{number}" for number, name in names.items())
