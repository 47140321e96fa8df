"""Assign the options of `--set key=value` to the methods that have them. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from billhook.errors import BillhookError, called_from_python
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.registry import Registry, hint


def split_options(
    options: Mapping[str, Any],
    method: str,
    allocators: Sequence[str],
    others: Iterable[str] = (),
    *,
    methods: Registry = CRITERIA,
    allocating: Registry = ALLOCATORS,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a criterion (or quantizer), parsed and complete, and those of `options` that any of `allocators`
    has, not parsed.

    An option of both is in both. Raises BillhookError for an option of neither; in Python, where keywords are options,
    its hint considers `others` too.
    """
    of_method = methods.options(method)
    of_allocators = {key for name in allocators for key in allocating.options(name)}
    known = list(dict.fromkeys([*sorted(of_allocators), *of_method]))
    for key in options:
        if key not in known:
            who = f"{methods.kind.capitalize()} {method!r} does not have"
            if allocators:
                named = f"{allocating.kind} {' or '.join(map(repr, allocators))}"
                who = f"Neither {named} nor {methods.kind} {method!r} has"
            near = hint(key, [*known, *(others if called_from_python() else ())])
            listed = f"{near} {'Their' if allocators else 'Its'} options: {', '.join(known) or 'none'}."
            raise BillhookError(f"{who} an option {key!r}.{listed}")
    given = {key: value for key, value in options.items() if key in of_allocators}
    return methods.configure(method, {key: value for key, value in options.items() if key in of_method}), given
