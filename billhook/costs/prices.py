"""What counted work costs: seconds on a machine, and memory.

`seconds` prices the counts of `billhook.costs.counts`. A price is how much of the machine's own speed a kind of work
gets: the speed of a matrix product or of attention for arithmetic, that of copying memory for what passes over it, and
the time of one small operation of torch for what is only called. The prices come from `benchmarks/scale.py`, which fits
them to small models and tries them on sizes it did not fit. Several processes share windows and layers as
`billhook.distributed.collectives` does, and what they send each other is counted.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from billhook.costs.counts import Count, Method, Sizes, Text, sent, walk, written

PROCESS = 0.5 * 2**30  # bytes: Python and the libraries
# Fractions of the speed that each kind is measured by; for what is only counted, how many small operations each takes.
PRICES = {
    "product": 0.923,
    "attention": 0.514,
    "backward": 1.14,
    "train": 1.04,
    "gram": 1.22,
    "solve": 0.979,
    "rows": 0.0435,
    "spectrum": 1.04,
    "elements": 0.0725,
    "watch": 0.00898,
    "logits": 0.0235,
    "select": 0.00667,
    "handle": 0.00264,
    "file": 0.808,
    "call": 19.2,
    "op": 0.721,
    "layer": 565,
    "run": 8740,
}
SPEEDS = {
    **dict.fromkeys(("product", "backward"), "product"),
    **dict.fromkeys(("train", "gram", "solve", "rows", "spectrum"), "single"),
    **dict.fromkeys(("elements", "watch", "logits", "select", "handle"), "copy"),
    "attention": "attention",
    "file": "file",
    "link": "link",
}


@dataclass(frozen=True)
class Machine:
    """Speeds of one process: products a second (FLOP/s) in the model's type and in float32, bytes a second copied in
    memory, attention (FLOP/s), bytes a second in files and to another process, the seconds of a small operation; and
    how many processes there are."""

    product: float
    single: float
    copy: float
    attention: float = 5e10
    file: float = 1e9
    link: float = 1e10
    op: float = 1.2e-6
    processes: int = 1


@dataclass(frozen=True)
class Cost:
    """Seconds in all and by kind, and the most memory that one process holds, in bytes."""

    seconds: float
    by_kind: dict[str, float]
    memory: float


def seconds(counts: Iterable[Count], machine: Machine, prices: Mapping[str, float] = PRICES) -> dict[str, float]:
    """The seconds of counted work by kind."""
    found: dict[str, float] = {}
    shared: dict[tuple[str, int], list[float]] = {}
    for kind, how, part, amount in counts:
        price = _price(kind, machine, prices)
        if how in ("layers", "blocks") and part is not None:
            step, owner = (part.block, part.number) if how == "layers" else (0, part.block)
            each = shared.setdefault((kind, step), [0.0] * machine.processes)
            each[owner % machine.processes] += amount * price
        else:
            found[kind] = found.get(kind, 0.0) + amount * price / (machine.processes if how == "windows" else 1)
    for (kind, _), each in shared.items():
        found[kind] = found.get(kind, 0.0) + max(each)  # the others wait for the slowest
    return found if machine.processes > 1 else {kind: took for kind, took in found.items() if kind != "link"}


def _price(kind: str, machine: Machine, prices: Mapping[str, float]) -> float:
    """The seconds of a unit of a kind of work."""
    if kind == "second":
        return 1.0
    if kind not in SPEEDS:
        return prices[kind] * machine.op
    return 1 / (prices.get(kind, 1.0) * float(getattr(machine, SPEEDS[kind])))


def memory(
    sizes: Sizes, method: Method, text: Text, *, streamed: bool = True, spill: float = math.inf, processes: int = 1
) -> float:
    """The most bytes that a process holds at once."""
    largest = max(part.weights for part in sizes.parts)
    widest = max(part.inputs for part in sizes.parts)
    tokens = text.tokens / processes
    held = sizes.outside + sizes.block_bytes if streamed else sizes.bytes
    total = PROCESS + held + 5 * 4 * largest
    if method.statistics or method.gradients:
        total += min(2 * tokens * sizes.width * sizes.itemsize, 2 * spill)
    if method.gradients:
        total += min(sizes.blocks * tokens * sizes.width * sizes.itemsize, spill)
        total += (4 + sizes.itemsize) * sizes.weights / sizes.blocks
    if "drift" in method.statistics:
        total += sizes.block_bytes + min(tokens * sizes.width * sizes.itemsize, spill) + 5 * 4 * widest**2
    elif "gram" in method.statistics:
        total += 4 * sum(part.inputs**2 for part in sizes.parts if part.leads) / sizes.blocks + 3 * 4 * widest**2
    return total


def cost(
    sizes: Sizes, method: Method, text: Text, machine: Machine, *, streamed: bool = True, spill: float = math.inf
) -> Cost:
    """Seconds and memory of a method on a machine, the model read and written once."""
    by_kind = seconds([*walk(sizes, method, text), *sent(sizes, method), *written(sizes)], machine)
    held = memory(sizes, method, text, streamed=streamed, spill=spill, processes=machine.processes)
    return Cost(sum(by_kind.values()), by_kind, held)
