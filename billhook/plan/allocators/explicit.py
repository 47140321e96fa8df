"""Explicit: sparsities that you give in a file.

For allocations from elsewhere: the block sparsities of a paper, or the result of another tool's search.

    {"blocks": [0.5, 0.6, ...]}              one sparsity per block, all scaled by one factor so that the mean is S
    {"layers": {"mlp.down_proj": 0.5, ...}}  exactly these; all other layers share the rest of the budget equally

The keys of `layers` are kinds of layers, exact names, or `re:REGEX`; if several match a layer, the last one counts.
Scaled sparsities are clipped at 1.

Limits: nothing is checked but the budget. If it cannot be met with the given sparsities, the plan is refused and the
nearest possible mean is named.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.budget import mean, scale_to
from billhook.plan.table import Table
from billhook.registry import hint, method
from billhook.store.files import read_json


@method(paper="given by hand")
def explicit(table: Table, target: float, *, file: str | None = None) -> dict[str, float]:
    """Return the sparsities of the JSON `file`; without a file, the uniform plan.

    Raises BillhookError for a file of another form, a pattern that matches no layer, and a mean that cannot be S.
    """
    if file is None:
        return dict.fromkeys(table.shapes, target)
    given = read_json(Path(file), "file of sparsities")
    if set(given) == {"blocks"}:
        return _by_block(table, target, given["blocks"], file)
    if set(given) == {"layers"} and isinstance(given["layers"], dict):
        return _by_pattern(table, target, given["layers"], file)
    raise BillhookError(
        f'{file}: the file must hold {{"blocks": [0.5, ...]}} or {{"layers": {{"mlp.down_proj": 0.5, ...}}}}.'
    )


def _by_block(table: Table, target: float, given: Any, file: str) -> dict[str, float]:
    blocks = list(table.blocks())
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(blocks):
        raise BillhookError(f"{file}: 'blocks' must list {len(blocks)} sparsities, one for each block of the table.")
    values = dict(zip(blocks, [_fraction(s, file) for s in given], strict=True))
    raw = [values[row.block] for row in table]
    if target > 0 and not any(raw):
        raise BillhookError(f"{file}: all sparsities are 0, which cannot be scaled to {target:g}.")
    scaled = scale_to(raw, [row.n for row in table], target) if target > 0 else [0.0] * len(raw)
    return dict(zip(table.shapes, scaled, strict=True))


def _by_pattern(table: Table, target: float, given: Mapping[str, Any], file: str) -> dict[str, float]:
    fixed: dict[str, float] = {}
    for pattern, s in given.items():
        matching = [row.layer for row in table if _matches(pattern, row.layer, row.kind)]
        if not matching:
            near = hint(pattern, {row.kind for row in table} | set(table.shapes))
            raise BillhookError(f"{file}: {pattern!r} matches no layer.{near} Give a kind, a layer, or re:REGEX.")
        fixed |= dict.fromkeys(matching, _fraction(s, file))
    sizes = {row.layer: row.n for row in table}
    rest = [name for name in sizes if name not in fixed]
    left = target * table.total - sum(s * sizes[name] for name, s in fixed.items())
    room = sum(sizes[name] for name in rest)
    if not -1e-9 * table.total <= left <= room * (1 + 1e-9) + 1e-9 * table.total:
        now = mean([fixed.get(name, 0.0 if left < 0 else 1.0) for name in sizes], list(sizes.values()))
        raise BillhookError(f"{file}: with these sparsities the mean cannot be {target:g}: the nearest is {now:.4g}.")
    share = min(1.0, max(0.0, left / room)) if room else 0.0
    return {name: fixed.get(name, share) for name in sizes}


def _matches(pattern: str, layer: str, kind: str) -> bool:
    if not pattern.startswith("re:"):
        return pattern in (layer, kind)
    try:
        return re.search(pattern[3:], layer) is not None
    except re.error as error:
        raise BillhookError(f"{pattern!r} is not a regular expression: {error}.") from None


def _fraction(s: Any, file: str) -> float:
    if isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s <= 1:
        raise BillhookError(f"{file}: a sparsity must be a number in [0, 1], got {s!r:.40}.")
    return float(s)
