"""Names to functions: how allocators, criteria and metrics are found, described and configured.

A registry maps a name to a place (`"package.module:function"`) and imports it only when asked, so names can be listed
without torch. A method is a plain function marked with `@method`; its keyword-only parameters are its options, and the
command line, the docs and the validation are all read off its signature.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from billhook.errors import BillhookError

Needs = Callable[..., tuple[str, ...]]


def method(
    *, paper: str, needs: tuple[str, ...] | Needs = (), group: Literal["row", "layer"] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as a method: `paper` is its source, `needs` the table columns or statistics it reads.

    `needs` may be a function of the method's options, e.g. `lambda metric: (metric,)`, called with the options by name.
    `group` is the comparison group a criterion uses unless told otherwise.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.paper = paper  # type: ignore[attr-defined]
        function.needs = needs  # type: ignore[attr-defined]
        function.group = group  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a method: its name, type and default."""

    name: str
    annotation: Any
    default: Any

    def parse(self, value: Any, where: str) -> Any:
        """Return `value` (a string from the command line, or a Python value) in this option's type, or raise."""
        if get_origin(self.annotation) is Literal:
            choices = get_args(self.annotation)
            if value not in choices:
                listed = ", ".join(map(str, choices))
                raise BillhookError(
                    f"{where}: {self.name}={value!r} is not one of {listed}.{hint(str(value), choices)}"
                )
            return value
        if get_origin(self.annotation) in (Union, UnionType):  # `float | None`: None means "choose for me"
            if value is None or value == "none":
                return None
            kind = next(a for a in get_args(self.annotation) if a is not type(None))
        else:
            kind = self.annotation
        try:
            if kind is bool:
                return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()]
            if kind is int and float(value) != int(float(value)):
                raise ValueError(value)
            result = kind(float(value)) if kind is int else kind(value)
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BillhookError(
                f"{where}: {self.name}={value!r} is not a valid {kind.__name__} (default {self.default!r})."
            ) from None
        if kind is float and result != result:
            raise BillhookError(f"{where}: {self.name} must be a number, got NaN (default {self.default!r}).")
        return result


def hint(word: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, [str(n) for n in names], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry:
    """A named family of methods (`kind` is the word used in messages)."""

    def __init__(self, kind: str, places: Mapping[str, str]) -> None:
        self.kind = kind
        self._places = dict(places)

    def names(self) -> list[str]:
        """All names, in the order they are shown to people."""
        return list(self._places)

    def check(self, name: str) -> None:
        """Raise BillhookError with the nearest name for an unknown one; imports nothing."""
        if name not in self._places:
            raise BillhookError(
                f"Unknown {self.kind} {name!r}.{hint(name, self._places)} There are: {', '.join(self._places)}."
            )

    def get(self, name: str) -> Callable[..., Any]:
        """Import and return the method called `name`; raises BillhookError as `check` does."""
        self.check(name)
        module, _, attribute = self._places[name].partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return function

    def options(self, name: str) -> dict[str, Option]:
        """The options of a method, from its keyword-only parameters."""
        parameters = inspect.signature(self.get(name)).parameters.values()
        return {p.name: Option(p.name, p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def configure(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return every option of `name` with the given values parsed and the rest at their defaults."""
        known = self.options(name)
        where = f"{self.kind} {name!r}"
        for key in given:
            if key not in known:
                listed = ", ".join(f"{o.name}={o.default}" for o in known.values()) or "none"
                raise BillhookError(f"{where} has no option {key!r}.{hint(key, known)} Its options: {listed}.")
        return {
            key: option.parse(given[key], where) if key in given else option.default for key, option in known.items()
        }

    def needs(self, name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The table columns or statistics the method reads with these (configured) options."""
        declared: tuple[str, ...] | Needs = self.get(name).needs  # type: ignore[attr-defined]
        return declared(**options) if callable(declared) else declared

    def group(self, name: str) -> Literal["row", "layer"]:
        """The comparison group a criterion uses unless told otherwise."""
        group: Literal["row", "layer"] = self.get(name).group  # type: ignore[attr-defined]
        return group

    def paper(self, name: str) -> str:
        """Where the method comes from."""
        return str(self.get(name).paper)  # type: ignore[attr-defined]
