"""The field tables of docs/formats, from the docstrings of the dataclasses that are written to files or printed.

A documented class has a bullet for each field, "* `name`: text" or "* `name` (type): text"; a name may be a path such
as `layers.*.zeros`. Without a type the field's annotation is put into words. A page names the classes in the line above
a table, each with the prefix of its paths; `?` marks what is optional as a whole:

    <!-- fields: NAME = module:Class, entries[]. module:Entry, extra. module:Extra? -->

A table below `<!-- fields: NAME -->` is written by hand.
"""

import importlib
import inspect
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from page_parts import table

_MARK = re.compile(r"(<!-- fields: [^=\n]+ = (.+) -->\n)(?:\|.*\n)*")
_BULLET = re.compile(r"^\* `([^`]+)`(?: \(([^)]+)\))?: (.*(?:\n  .*)*)", re.MULTILINE)
_WORDS = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null", Any: "any"}


class Part(NamedTuple):
    """A class ("module:Class"), the prefix of the paths of its fields, and whether it may be missing."""

    prefix: str
    place: str
    optional: bool = False


def pages(folder: Path) -> dict[str, str]:
    """File name -> text of every page of docs/formats, its generated tables made anew."""
    return {path.name: filled(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.md"))}


def filled(text: str) -> str:
    """`text` with the tables behind the marks that name classes."""

    def made(mark: re.Match[str]) -> str:
        parts = []
        for part in mark[2].split(", "):
            prefix, _, place = part.rpartition(" ")
            parts.append(Part(prefix, place.removesuffix("?"), place.endswith("?")))
        return mark[1] + table(["field", "type", "meaning"], rows(parts)) + "\n"

    return _MARK.sub(made, text)


def rows(parts: Sequence[Part]) -> list[list[str]]:
    """Path, type and meaning of every field; a field that has a part of its own is replaced by the rows of that."""
    found = []
    for prefix, place, optional in parts:
        for name, kind, text in fields(place):
            path = prefix + name
            if not any(other.prefix.startswith((f"{path}.", f"{path}[]")) for other in parts):
                kind = f"{kind}, optional" if optional and "optional" not in kind else kind
                found.append([f"`{path}`", kind, text])
    return found


def fields(place: str) -> list[tuple[str, str, str]]:
    """(name, type, text) of the bullets of a class; raises AssertionError for a field without one."""
    module, _, name = place.partition(":")
    cls = getattr(importlib.import_module(module), name)
    kinds = typing.get_type_hints(cls)
    found = [
        (name, kind or in_words(kinds[name]), " ".join(text.split()))
        for name, kind, text in _BULLET.findall(inspect.getdoc(cls) or "")
    ]
    named = {re.split(r"[.\[]", name)[0] for name, _, _ in found}
    missing = [name for name in cls.__dataclass_fields__ if name not in named]
    assert not missing, f"{place} does not document {', '.join(missing)}"
    return found


def in_words(kind: Any) -> str:
    """A type annotation as the type of a JSON value."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in _WORDS:
        return _WORDS[kind]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(in_words(part) for part in inner)
    if origin in (list, tuple):
        return f"list of {in_words(inner[0])}s" if inner[0] in _WORDS else "list"
    return "object"
