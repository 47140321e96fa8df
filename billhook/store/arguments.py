"""Check arguments from Python against their annotations, so that a wrong type is an error that names the argument."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from billhook.errors import BillhookError

_NUMBERS: dict[Any, type] = {int: Integral, float: Real}  # of numpy, too
_WORDS = {str: "a string", Path: "a path", int: "a whole number", float: "a number", bool: "True or False"}
_WORDS |= {NoneType: "None", Sequence: "a list", Mapping: "a mapping"}


def check_fields(given: Any, *, but: Collection[str] = ()) -> None:
    """Raise BillhookError naming the first field of a dataclass, of those not in `but`, with a value of another type
    than it is annotated with.

    Equivalents of torch, numpy and Python take the annotated form: dtypes and devices are names, arrays and sets lists.
    """
    kinds = get_type_hints(type(given))
    for item in fields(given):
        if item.name not in but:
            value = _plain(getattr(given, item.name))
            check_argument(item.name, value, kinds[item.name])
            given.__dict__[item.name] = value  # of a frozen object, which nobody has yet


def _plain(value: Any) -> Any:
    """A dtype or device of torch by its name, an array or a scalar of numpy as Python's, a set as a sorted list."""
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if kind.__module__ == "numpy":
        return value.tolist()
    return sorted(value, key=str) if isinstance(value, set | frozenset) else value


def check_argument(name: str, value: Any, kind: Any) -> None:
    """Raise BillhookError, naming the argument, for a value that is not of `kind`: a class, a union, a Literal, a
    Sequence of one kind, or a Mapping (of which only the keys are checked)."""
    if not _fits(value, kind):
        raise BillhookError(f"{name}={value!r:.40} must be {' or '.join(_words(kind))}.")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in _NUMBERS:
        return isinstance(value, _NUMBERS[origin]) and not isinstance(value, bool)
    if not isinstance(value, origin) or (origin is Sequence and isinstance(value, str)):
        return False
    return origin not in (Sequence, Mapping) or all(_fits(item, inner[0]) for item in value)


def _words(kind: Any) -> list[str]:
    """What a kind is called; alternatives one by one."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return [words for one in inner for words in _words(one)]
    if origin is Literal:
        return [f"one of {', '.join(inner)}"] if any(inner) else []  # "" stands for what is not given
    if origin is Sequence:
        return [f"a list (of each item: {' or '.join(_words(inner[0]))})"]
    return [_WORDS.get(origin, f"a {origin.__name__}")]
