"""What a job costs, from sizes alone: operations and bytes by kind, and from them seconds and memory on a machine.

`work` counts what one process would do, by the formulas of the methods; `seconds` prices the counts. A price is how much of the machine's
own speed a kind of work gets: the speed of a matrix product for arithmetic, that of copying memory for selection. The prices come from
`benchmarks/scale.py`, which fits them to small models and tries them on sizes it did not fit. Several processes share windows and layers
as `billhook.parallel.ranks` does, and what they send each other is counted. It knows nothing about refinement, `auto` or evaluation.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

PROCESS = 0.5 * 2**30  # bytes: Python and the libraries
GRADIENT_PASSES = 4  # in forward passes: one that stores, one again with a graph, and a backward pass that costs as much as both

FACTOR = 3.0  # a factorization runs at about a third of the speed of a product
EIGENVALUES = 4.0  # those of a matrix of side n take as long as so many times n^3 operations of the product that made it
BESIDE = 4.2  # passes through a block that is observed group by group beside the dense model, few of them to its end (Llama's shape)
NARROW, FEW, LARGE = 512, 256, 2048  # where ADMM and spectra change their type, see billhook.criteria.admm and billhook.measuring.eigen
COUNTED = ("call", "layer", "run")
# Fractions of the speed of a product (of the model's type, or float32) that each kind gets; seconds for the rest.
PRICES = {
    "product": 0.828,
    "backward": 0.852,
    "gram": 0.412,
    "solve": 1.42,
    "rows": 0.052,
    "spectrum": 0.775,
    "select": 0.00135,
    "file": 0.67,
    "call": 0.0004,
    "layer": 0.00365,
    "run": 0.0747,
}


@dataclass(frozen=True)
class Part:
    """One prunable layer [out, inputs], number so and so of its block; `share` is the part of the tokens that reach it, `leads` is false
    where a layer before it reads the same input."""

    out: int
    inputs: int
    block: int
    number: int
    share: float = 1.0
    leads: bool = True

    @property
    def weights(self) -> int:
        """Their number."""
        return self.out * self.inputs


@dataclass(frozen=True)
class Sizes:
    """What a cost depends on: the layers, blocks and width of a model, bytes a number takes, and bytes outside the blocks and in all."""

    parts: tuple[Part, ...]
    blocks: int
    width: int
    itemsize: int
    outside: int
    bytes: int

    @property
    def block_bytes(self) -> float:
        """The bytes of one block."""
        return (self.bytes - self.outside) / self.blocks


@dataclass(frozen=True)
class Text:
    """Calibration text: windows of `length` tokens, `batch` of them at a time."""

    windows: int = 0
    length: int = 1
    batch: int = 1

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.windows * self.length


@dataclass(frozen=True)
class Method:
    """What a criterion or a measurement asks for: statistics, gradients, the work on one layer; `dense` saves the second pass."""

    statistics: tuple[str, ...] = ()
    gradients: bool = False
    selections: float = 1.0
    solves: Callable[[Part], dict[str, float]] = field(default=lambda part: {})
    dense: bool = False


@dataclass(frozen=True)
class Machine:
    """Speeds of one process: products a second (FLOP/s) in the model's type and in float32, bytes a second copied in memory, read and
    written in files, and sent to another process; and how many processes there are."""

    product: float
    single: float
    copy: float
    file: float = 1e9
    link: float = 1e10
    processes: int = 1


@dataclass(frozen=True)
class Cost:
    """Seconds in all and by kind, and the most memory that one process holds, in bytes."""

    seconds: float
    by_kind: dict[str, float]
    memory: float


def sparsegpt(part: Part) -> dict[str, float]:
    """Cholesky factor and its inverse, in^3 / 3 each, and the updates of all columns to the right."""
    return {"solve": FACTOR * 2 / 3 * part.inputs**3 + part.out * part.inputs**2}


def admm(part: Part, steps: int, sparsity: float = 0.5) -> dict[str, float]:
    """A factor and the inverse of the matrix, a product of the layer with it a step, and the solution on the support: by a factor of each
    row, where it keeps few, or as many products again. In float64, at half the speed, where layers are narrow."""
    double, kept = (2 if part.inputs <= NARROW else 1), (1 - sparsity) * part.inputs
    rows = part.out * kept**3 / 3 * 2 if kept <= FEW else 0.0
    products = steps + (2 if rows else max(steps, 3))
    return {"solve": double * (FACTOR * part.inputs**3 + 2.0 * products * part.out * part.inputs**2), "rows": rows}


def spectrum(part: Part) -> dict[str, float]:
    """The lower triangle of the Gram matrix of the smaller side, and its eigenvalues; in float64 where that side is short."""
    small, large = sorted((part.out, part.inputs))
    double = 2 if small < LARGE else 1
    return {"spectrum": double * (small**2 * large + EIGENVALUES * small**3)}


def work(sizes: Sizes, method: Method, text: Text) -> Iterator[tuple[str, str, Part | None, float]]:
    """Yield (kind, how processes share it, layer, amount): `windows`, `layers` or `blocks` are shared out, `all` do the rest each.

    Operations for arithmetic, weights for `select`, bytes for `file`, a count for `call`, `layer` and `run`.
    """
    drift = "drift" in method.statistics
    looks, split = bool(method.statistics), "blocks" if method.dense else "layers"
    for part in sizes.parts:
        passes = (BESIDE if drift else 1) + (not method.dense and part.block + 1 < sizes.blocks)
        forward = 2.0 * part.weights * part.share * text.tokens
        attention = 4.0 * text.length * text.tokens * sizes.width * sizes.blocks / len(sizes.parts)
        calls = text.windows / text.batch
        if looks:
            yield "product", "windows", part, passes * (forward + attention)
            yield "call", "windows", part, passes * calls
        if method.gradients:
            yield "backward", "windows", part, GRADIENT_PASSES * (forward + attention)
            yield "call", "windows", part, 4.0 * text.windows
        if "gram" in method.statistics and part.leads:
            yield "gram", "windows", part, (10 / 16 + drift) * 2.0 * text.tokens * part.share * part.inputs**2
        if drift:
            yield "solve", split, part, FACTOR / 3 * part.inputs**3 + 4.0 * part.out * part.inputs**2
        for kind, amount in method.solves(part).items():
            yield kind, split, part, amount
        yield "select", split, part, method.selections * part.weights
        yield "layer", split, part, 1.0
    yield "file", "all", None, float(sizes.bytes)
    yield "run", "all", None, 1.0


def seconds(sizes: Sizes, method: Method, text: Text, machine: Machine, prices: Mapping[str, float] = PRICES) -> dict[str, float]:
    """The seconds of a job by kind of work."""
    speeds = {"product": machine.product, "backward": machine.product, "file": machine.file, "select": machine.copy}
    found: dict[str, float] = {}
    shared: dict[tuple[str, int], list[float]] = {}
    for kind, how, part, amount in work(sizes, method, text):
        price = prices[kind] if kind in COUNTED else 1 / (prices[kind] * speeds.get(kind, machine.single))
        if how in ("layers", "blocks") and part is not None:
            step, owner = (part.block, part.number) if how == "layers" else (0, part.block)
            each = shared.setdefault((kind, step), [0.0] * machine.processes)
            each[owner % machine.processes] += amount * price
        else:
            found[kind] = found.get(kind, 0.0) + amount * price / (machine.processes if how == "windows" else 1)
    for (kind, _), each in shared.items():
        found[kind] = found.get(kind, 0.0) + max(each)  # the others wait for the slowest
    if machine.processes > 1:
        found["link"] = _sent(sizes, method) / machine.link
    return found


def _sent(sizes: Sizes, method: Method) -> float:
    """Bytes that a process sends: sums of statistics there and back, gradients, and every pruned layer once."""
    grams = sum(4 * part.inputs**2 for part in sizes.parts if part.leads) if "gram" in method.statistics else 0
    weights = sum(part.weights for part in sizes.parts)
    return 2.0 * grams + (2.0 * 4 * weights if method.gradients else 0.0) + (0.0 if method.dense else sizes.itemsize * weights)


def memory(sizes: Sizes, method: Method, text: Text, *, streamed: bool = True, spill: float = math.inf, processes: int = 1) -> float:
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
        total += (4 + sizes.itemsize) * sum(part.weights for part in sizes.parts) / sizes.blocks
    if "drift" in method.statistics:
        total += sizes.block_bytes + min(tokens * sizes.width * sizes.itemsize, spill) + 5 * 4 * widest**2
    elif "gram" in method.statistics:
        total += 4 * sum(part.inputs**2 for part in sizes.parts if part.leads) / sizes.blocks + 3 * 4 * widest**2
    return total


def cost(sizes: Sizes, method: Method, text: Text, machine: Machine, *, streamed: bool = True, spill: float = math.inf) -> Cost:
    """Seconds and memory of a job on a machine."""
    by_kind = seconds(sizes, method, text, machine)
    held = memory(sizes, method, text, streamed=streamed, spill=spill, processes=machine.processes)
    return Cost(sum(by_kind.values()), by_kind, held)


def llama(width: int, inner: int, blocks: int, *, vocabulary: int = 32000, keys: int | None = None, itemsize: int = 2) -> Sizes:
    """A model of the Llama family with a head of its own; `keys` is the width of keys and values where it is smaller."""
    keys = width if keys is None else keys
    shapes = [(width, width), (keys, width), (keys, width), (width, width), (inner, width), (inner, width), (width, inner)]
    own = [(*shape, lead) for shape, lead in zip(shapes, (True, False, False, True, True, False, True), strict=True)]
    parts = [Part(out, size, block, n, 1.0, lead) for block in range(blocks) for n, (out, size, lead) in enumerate(own)]
    outside = 2 * vocabulary * width * itemsize
    return Sizes(tuple(parts), blocks, width, itemsize, outside, outside + itemsize * sum(part.weights for part in parts))
