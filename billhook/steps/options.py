"""Assign the options of `--set key=value` to the methods that have them. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.registry import hint


def split_options(
    options: Mapping[str, Any], criterion: str, allocators: Sequence[str], others: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The criterion's options, parsed and complete, and those of `options` that any of `allocators` has, not parsed.

    An option of both is in both. Raises BillhookError for an option of neither; its hint considers `others` too.
    """
    of_criterion = CRITERIA.options(criterion)
    of_allocators = {key for name in allocators for key in ALLOCATORS.options(name)}
    known = list(dict.fromkeys([*sorted(of_allocators), *of_criterion]))
    for key in options:
        if key not in known:
            who = f"Criterion {criterion!r} does not have"
            if allocators:
                who = f"Neither allocator {' or '.join(map(repr, allocators))} nor criterion {criterion!r} has"
            listed = f"{hint(key, [*known, *others])} Their options: {', '.join(known) or 'none'}."
            raise BillhookError(f"{who} an option {key!r}.{listed}")
    given = {key: value for key, value in options.items() if key in of_allocators}
    return CRITERIA.configure(criterion, {key: value for key, value in options.items() if key in of_criterion}), given
