"""The field tables of docs/formats, from the docstrings of the dataclasses that are written to files or printed.

A documented class has a bullet for each field, "* `name`: text" or "* `name` (type): text"; a name may be a path such
as `layers.*.zeros`. Without a type the field's annotation is put into words. In a page, the table of NAME follows the
line `<!-- fields: NAME -->`; tables of names that are not in `DOCUMENTED` are written by hand.
"""

import importlib
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from page_parts import table

Parts = Sequence[tuple[str, str]]  # (prefix of the paths, "module:class")

DOCUMENTED: Mapping[str, Parts] = {}
_BULLET = re.compile(r"^\* `([^`]+)`(?: \(([^)]+)\))?: (.*(?:\n  .*)*)", re.MULTILINE)
_TABLE = r"(<!-- fields: {} -->\n)(?:\|.*\n)*"
_WORDS = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null", Any: "any"}


def pages(folder: Path) -> dict[str, str]:
    """File name -> text of every page of docs/formats, its generated tables made anew."""
    return {path.name: filled(path.read_text(encoding="utf-8"), DOCUMENTED) for path in sorted(folder.glob("*.md"))}


def filled(text: str, documented: Mapping[str, Parts]) -> str:
    """`text` with the tables of `documented` names behind their marks."""
    for name, parts in documented.items():
        made = table(["field", "type", "meaning"], rows(parts)) + "\n"
        text = re.sub(_TABLE.format(re.escape(name)), lambda mark, made=made: mark[1] + made, text)
    return text


def rows(parts: Parts) -> list[list[str]]:
    """Path, type and meaning of every field; a field that has a part of its own is replaced by the rows of that."""
    prefixes = [prefix for prefix, _ in parts]
    found = []
    for prefix, place in parts:
        for name, kind, text in fields(place):
            path = prefix + name
            if not any(other.startswith((f"{path}.", f"{path}[]")) for other in prefixes):
                found.append([f"`{path}`", kind, text])
    return found


def fields(place: str) -> list[tuple[str, str, str]]:
    """(name, type, text) of the bullets of a class; raises AssertionError for a field without one."""
    module, _, name = place.partition(":")
    cls = getattr(importlib.import_module(module), name)
    kinds = typing.get_type_hints(cls) if inspect.isclass(cls) else {}
    found = [
        (name, kind or in_words(kinds[name]), " ".join(text.split()))
        for name, kind, text in _BULLET.findall(inspect.getdoc(cls) or "")
    ]
    named = {re.split(r"[.\[]", name)[0] for name, _, _ in found}
    missing = [name for name in getattr(cls, "__dataclass_fields__", {}) if name not in named]
    assert not missing, f"{place} does not document {', '.join(missing)}"
    return found


def in_words(kind: Any) -> str:
    """A type annotation as the type of a JSON value."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(part) for part in inner)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return f"list of {in_words(inner[0])}s" if inner and inner[0] in _WORDS else "list"
    return "object"
