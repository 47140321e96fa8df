"""Registries of allocators, criteria and metrics: how methods are found by name, described and configured.

A registry maps a name to `"package.module:function"` and imports the module on first use, so names can be listed
without importing torch. A method is a function marked with `@method`; its keyword-only parameters are its options, from
which the command line, the documentation and the validation are derived.

Methods and tasks of other installed packages are found through entry points of the group `billhook.methods`, named
`KIND:NAME`, with a hyphen in the place of a space in KIND:

    [project.entry-points."billhook.methods"]
    "allocator:depth" = "depth_plugin:depth"

Entry points are read when a name is not built in and when names are listed; a plugin never replaces a built-in method.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from billhook.errors import BillhookError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = f"{__package__}.methods"  # of the entry points that other packages declare
Needs = Callable[..., tuple[str, ...]]


def method(
    *, paper: str, needs: tuple[str, ...] | Needs = (), group: Literal["row", "layer"] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as a method: `paper` is its source, `needs` the table columns or statistics it reads.

    `needs` may be a function of the method's options by name, e.g. `lambda metric: (metric,)`. `group` is the default
    comparison group of a criterion.
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
        """`value` (a string or a Python value) in this option's type; raises BillhookError where that is impossible."""
        if get_origin(self.annotation) is Literal:
            choices = get_args(self.annotation)
            if value not in choices:
                listed = f"{', '.join(map(str, choices))}.{hint(str(value), choices)}"
                raise BillhookError(f"{where}: {self.name}={value!r} is not one of {listed}")
            return value
        if get_origin(self.annotation) in (Union, UnionType):  # `float | None`, where None means automatic
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
    """` Did you mean 'x'?` with the nearest of `names`, or an empty string when none is similar."""
    close = difflib.get_close_matches(word, [str(n) for n in names], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry:
    """The methods of one `kind`, the word in messages and in the names of entry points.

    `mark` is the attribute that what a plugin declares must have: methods have a paper. `beside` are names that
    commands accept in the same place, and that messages list too.
    """

    def __init__(
        self,
        kind: str,
        built_in: Mapping[str, str],
        *,
        plugins: bool = False,
        mark: str = "paper",
        beside: Sequence[str] = (),
    ) -> None:
        self.kind, self._mark, self._beside = kind, mark, beside
        self._built_in = dict(built_in)
        self._accepts_plugins = plugins

    @property
    def built_in(self) -> list[str]:
        """The names of the package's own methods, without looking for plugins."""
        return list(self._built_in)

    def names(self) -> list[str]:
        """All names: the built-in ones in display order, then those of plugins, sorted."""
        return [*self._built_in, *sorted(self._plugins().keys() - self._built_in.keys())]

    def check(self, name: str) -> None:
        """Raise BillhookError with the nearest name for an unknown one; imports no method."""
        if name not in self._built_in and name not in self._plugins():
            names = [*self.names(), *self._beside]
            raise BillhookError(f"Unknown {self.kind} {name!r}.{hint(name, names)} There are: {', '.join(names)}.")

    def get(self, name: str) -> Callable[..., Any]:
        """Import a method; raises BillhookError for an unknown name, and for a plugin that cannot be loaded."""
        self.check(name)
        if name not in self._built_in:
            return self._load(name, self._plugins()[name])
        module, _, attribute = self._built_in[name].partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return function

    def _plugins(self) -> dict[str, list["EntryPoint"]]:
        """Name -> the entry points of installed packages."""
        if not self._accepts_plugins:
            return {}
        from importlib.metadata import entry_points  # takes 20 ms, which `--help` does not need

        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=GROUP):
            kind, _, name = point.name.partition(":")
            if kind == self.kind.replace(" ", "-") and name:
                found.setdefault(name, []).append(point)
        return found

    def _load(self, name: str, points: Sequence["EntryPoint"]) -> Callable[..., Any]:
        """Import a plugin's method; raises BillhookError, naming the distribution, where that fails."""
        owners = [f"{p.dist.name} {p.dist.version}" if p.dist else "an unnamed distribution" for p in points]
        if len(points) > 1:
            raise BillhookError(f"{self.kind} {name!r} is declared by {' and '.join(owners)}: uninstall all but one.")
        where = f"The {self.kind} {name!r} of {owners[0]} ({points[0].value})"
        try:
            function: Callable[..., Any] = points[0].load()
        except Exception as error:  # whatever the plugin's module raises while it is imported
            raise BillhookError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
        if not hasattr(function, self._mark):
            advice = "mark it with @billhook.registry.method" if self._mark == "paper" else f"it has no {self._mark}"
            raise BillhookError(f"{where} is not a {'method' if self._mark == 'paper' else self.kind}: {advice}.")
        return function

    def options(self, name: str) -> dict[str, Option]:
        """The options of a method, from its keyword-only parameters."""
        parameters = inspect.signature(self.get(name)).parameters.values()
        return {p.name: Option(p.name, p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def configure(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options of a method, those `given` parsed and the others at their defaults."""
        known = self.options(name)
        where = f"{self.kind} {name!r}"
        for key in given:
            if key not in known:
                listed = ", ".join(f"{o.name}={o.default}" for o in known.values()) or "none"
                raise BillhookError(f"{where} has no option {key!r}.{hint(key, known)} Its options: {listed}.")
        return {key: o.parse(given[key], where) if key in given else o.default for key, o in known.items()}

    def needs(self, name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
        """The table columns or statistics the method reads with these (configured) options."""
        declared: tuple[str, ...] | Needs = self.get(name).needs  # type: ignore[attr-defined]
        return declared(**options) if callable(declared) else declared

    def group(self, name: str) -> Literal["row", "layer"]:
        """The default comparison group of a criterion."""
        group: Literal["row", "layer"] = self.get(name).group  # type: ignore[attr-defined]
        return group

    def paper(self, name: str) -> str:
        """The source of a method."""
        return str(self.get(name).paper)  # type: ignore[attr-defined]
