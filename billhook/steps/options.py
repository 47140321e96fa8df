"""Options given by name, `--set key=value`, sorted to the methods that have them. No torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.registry import hint


def split_options(
    options: Mapping[str, Any], criterion: str, allocators: Sequence[str], others: Iterable[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the criterion's options, parsed and complete, and those of `options`, as given, that any of `allocators`
    has.

    An option that both have goes to both. Raises BillhookError for one that nobody has; its hint looks at the names in
    `others` too.
    """
    of_criterion = CRITERIA.options(criterion)
    of_allocators = {key for name in allocators for key in ALLOCATORS.options(name)}
    known = list(dict.fromkeys([*sorted(of_allocators), *of_criterion]))
    for key in options:
        if key not in known:
            names = " or ".join(map(repr, allocators))
            who = (
                f"Neither allocator {names} nor criterion {criterion!r} has"
                if allocators
                else f"Criterion {criterion!r} does not have"
            )
            raise BillhookError(
                f"{who} an option {key!r}.{hint(key, [*known, *others])} Their options: {', '.join(known) or 'none'}."
            )
    given = {key: value for key, value in options.items() if key in of_allocators}
    return CRITERIA.configure(criterion, {key: value for key, value in options.items() if key in of_criterion}), given
