"""Check values from a json file against types, so that the code that uses them can rely on them."""

from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from billhook.errors import BillhookError

_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", NoneType: "null"}
_WORDS |= {list: "a list", tuple: "a list", dict: "an object"}


def typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: str, int, float, bool, None, list, tuple, dict, a dataclass, or a union of them; or a dict of
    kinds, the fields of an object that are checked, where a missing one is null.

    Raises BillhookError that names the place after `where`: a missing field, or a value of another type.
    """
    if kind is Any:
        return value
    if isinstance(kind, dict):
        for key, inner in kind.items():
            typed(inner, typed(dict, value, where).get(key), f"{where}, {key}")
        return value
    if is_dataclass(kind):
        return _instance(kind, value, where)
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(inner, value, where)
    if origin is Literal:
        fits = value in inner
    elif origin is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    elif origin is tuple:
        fits = isinstance(value, list) and (Ellipsis in inner or len(value) == len(inner))
    else:
        fits = isinstance(value, origin) and not (origin is int and isinstance(value, bool))
    if not fits:
        raise BillhookError(f"{where}: must be {_words(kind)}, found {value!r:.60}.")
    if inner and origin is dict:
        return {key: typed(inner[1], item, f"{where}, {key}") for key, item in value.items()}
    if inner and origin in (list, tuple):
        kinds = inner if origin is tuple and Ellipsis not in inner else inner[:1] * len(value)
        return origin(typed(k, x, f"{where}, number {n}") for n, (k, x) in enumerate(zip(kinds, value, strict=True)))
    return value


def _instance(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from an object; fields that it does not have are ignored."""
    typed(dict, value, where)
    hints = get_type_hints(kind)
    for item in fields(kind):
        if item.name not in value and item.default is MISSING and item.default_factory is MISSING:
            raise BillhookError(f"{where}: {item.name!r} is missing.")
    return kind(**{key: typed(hints[key], value[key], f"{where}, {key}") for key in hints if key in value})


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """`value` as the one of `kinds` that it is; the error is that of the first where it is of none."""
    if value is None and NoneType in kinds:
        return None
    for kind in kinds[1:]:
        try:
            return typed(kind, value, where)
        except BillhookError:
            continue
    return typed(kinds[0], value, where)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    inner = get_args(kind)
    length = f" of {len(inner)}" if get_origin(kind) is tuple and Ellipsis not in inner else ""
    return _WORDS.get(get_origin(kind) or kind, str(kind)) + length
