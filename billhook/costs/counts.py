"""What jobs do, counted from sizes alone: operations, numbers, bytes and calls by kind, by the formulas of the methods.

A count is (kind, how processes share it, layer, amount): `windows`, `layers` of a block or `blocks` are shared out,
`all` each does. The amount is operations for arithmetic (`product`, `attention`, `backward`, `train`, `gram`, `solve`,
`rows`, `spectrum`), numbers for what passes over memory (`elements`, `watch`, `logits`, `select`, `handle`), bytes for
`file` and `link`, a number for `call` (of a layer on a batch), `op` (one small operation of torch), `layer` and `run`
(what records and files of them cost); `billhook.costs.prices` has prices.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

FACTOR = 3.0  # a factorization runs at about a third of the speed of a product
EIGENVALUES = (
    4.0  # those of a matrix of side n take as long as so many times n^3 operations of the product that made it
)
GATHER = 40.0  # taking one number out of a matrix takes as long as so many operations on small matrices
GRADIENT_PASSES = (
    4  # in forward passes: one that stores, one again with a graph, and a backward pass that costs as much as both
)
BACKWARD_PASSES = 3  # with everything in memory: one forward, and a backward pass that costs as much as two
SUMS = 3  # times that a gradient is read or written to add its size to a sum
ADAM = 12  # the same for a step of Adam
READING = 1 / 3  # of what it takes to read, check and write a byte
LAYER_OPS, STEP_OPS, COLUMN_OPS, FIT_OPS = (
    100,
    30,
    4,
    800,
)  # small operations a layer, a step of ADMM, a column of SparseGPT, a tail
NARROW, FEW, LARGE = (
    512,
    256,
    2048,
)  # where ADMM and spectra change their type, see billhook.methods.sparse.admm and billhook.measurement.eigen
CHECK, HELD, STEP = (
    12,
    8,
    4,
)  # ADMM ends at this alternation at the earliest; billhook.recover.blockwise holds out a window of 8 and steps after 4

Count = tuple[str, str, "Part | None", float]


@dataclass(frozen=True)
class Part:
    """One prunable layer [out, inputs], number so and so of its block; `share` is the part of the tokens that reach it
    (below 1 for an expert), `leads` is false where a layer before it reads the same input."""

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
    """What a cost depends on: the layers, blocks and width of a model, bytes a number takes, bytes outside the blocks
    and in all, and how many tokens the model knows."""

    parts: tuple[Part, ...]
    blocks: int
    width: int
    itemsize: int
    outside: int
    bytes: int
    vocabulary: int = 0

    @property
    def block_bytes(self) -> float:
        """The bytes of one block."""
        return (self.bytes - self.outside) / self.blocks

    @property
    def weights(self) -> int:
        """Those of all layers."""
        return sum(part.weights for part in self.parts)


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

    @property
    def batches(self) -> int:
        """Their number."""
        return math.ceil(self.windows / self.batch)


@dataclass(frozen=True)
class Method:
    """What a criterion or a measurement asks for: statistics, gradients, how often a layer's weights are ranked, and
    the rest of the work on it, where anything is done to layers (`touches`).

    `dense` changes no weight, which saves the second pass; `beside` passes the dense model's block as well, whatever
    the statistics.
    """

    statistics: tuple[str, ...] = ()
    gradients: bool = False
    selections: Callable[[Part], float] = field(default=lambda part: 1.0)
    solves: Callable[[Part], dict[str, float]] = field(default=lambda part: {})
    dense: bool = False
    beside: bool = False
    touches: bool = True


def nothing(part: Part) -> dict[str, float]:
    """No work beyond ranking."""
    return {}


def sparsegpt(part: Part) -> dict[str, float]:
    """Cholesky factor and its inverse, in^3 / 3 each, and the updates of all columns to the right."""
    return {"solve": FACTOR * 2 / 3 * part.inputs**3 + part.out * part.inputs**2, "op": COLUMN_OPS * part.inputs}


def admm(part: Part, steps: int, sparsity: float, ramp: int) -> dict[str, float]:
    """An inverse of the matrix, another at every third step after the ramp, a product of the layer with it a step, and
    the solution on the support: by a factor of each row, where few weights are kept, or as many products again. Narrow
    layers take float64, at half speed.
    """
    double, kept = (2 if part.inputs <= NARROW else 1), (1 - sparsity) * part.inputs
    inverses = 1 + sum(step % 3 == 0 for step in range(ramp, steps))
    direct = kept <= FEW
    products = steps + (2 if direct else max(steps, 3))
    found = {"solve": double * (FACTOR * inverses * part.inputs**3 + 2.0 * products * part.out * part.inputs**2)}
    found["rows"] = part.out * (kept**3 / 3 + GATHER * kept**2) if direct else 0.0
    return found | {"op": float(STEP_OPS * steps)}


def spectrum(part: Part) -> dict[str, float]:
    """The lower triangle of the Gram matrix of the smaller side and its eigenvalues, in float64 where that side is
    short; a tail's fit."""
    small, large = sorted((part.out, part.inputs))
    double = 2 if small < LARGE else 1
    return {"spectrum": double * (small**2 * large + EIGENVALUES * small**3), "op": float(FIT_OPS)}


def walk(sizes: Sizes, method: Method, text: Text) -> Iterator[Count]:
    """One pass of `billhook.engine.walk` through the blocks, with what is done to their layers, and the gradients taken
    before it."""
    drift = "drift" in method.statistics and not method.dense
    split = "blocks" if method.dense else "layers"
    for part, group in _grouped(sizes):
        again = not method.dense and part.block + 1 < sizes.blocks
        looks = 0.0
        if drift:
            looks = _beside(sizes, part, group, text)
        elif method.statistics:
            ends = group.number + 1 == group.all and not (
                group.experts or method.dense
            )  # with the last input, from the second batch on
            looks = 1.0 / text.batches if ends else 1.0
        passes = looks + again * (bool(method.statistics) or method.beside) + (method.beside and not drift)
        if passes:
            passes += (part.block == 0) / text.batches  # one batch finds out what blocks return
            yield from _forward(sizes, part, text, passes)
        if method.gradients:
            single = Text(text.windows, text.length, 1)  # each window on its own
            yield from _forward(sizes, part, single, GRADIENT_PASSES, "backward")
            yield "elements", "windows", part, float(SUMS * text.windows * part.weights)
        if part.leads and method.statistics:
            moved = drift and part.share == 1
            yield "watch", "windows", part, (1 + moved) * text.tokens * part.share * part.inputs
            if "gram" in method.statistics:
                yield "gram", "windows", part, (10 / 16 + moved) * 2.0 * text.tokens * part.share * part.inputs**2
            if moved and part.out == sizes.width and group.number:
                yield "gram", "windows", part, 2.0 * text.tokens * part.weights
        if drift and part.share == 1:
            double = 2 if part.inputs <= NARROW else 1
            yield "solve", split, part, double * (FACTOR / 3 * part.inputs**3 + 4.0 * part.out * part.inputs**2)
        for kind, amount in method.solves(part).items():
            yield kind, split, part, amount
        if method.touches:
            yield "select", split, part, method.selections(part) * part.weights
            yield "handle", split, part, float(part.weights)
            yield "op", split, part, float(LAYER_OPS)


@dataclass(frozen=True)
class _Group:
    """The number of a layer's group (those of one input together, each kind of experts together), how many groups its
    block has, how many of them, the last ones, are of experts, and of how many it is tried whether they write into the
    stream of the model."""

    number: int
    all: int
    experts: int
    tried: int


def _grouped(sizes: Sizes) -> Iterator[tuple[Part, _Group]]:
    """Every layer with its group."""
    blocks: dict[int, list[Part]] = {}
    for part in sizes.parts:
        blocks.setdefault(part.block, []).append(part)
    for parts in blocks.values():
        numbers: list[int] = []
        experts: dict[tuple[int, int], int] = {}
        for part in parts:
            key = (part.out, part.inputs)
            new = not numbers or (key not in experts if part.share < 1 else part.leads)
            number = max(numbers, default=-1) + 1 if new else experts[key] if part.share < 1 else numbers[-1]
            numbers.append(number)
            if part.share < 1:
                experts.setdefault(key, number)
        tried = sum(part.leads and part.share == 1 and part.out == sizes.width for part in parts)
        yield from (
            (part, _Group(number, max(numbers) + 1, len(experts), tried))
            for part, number in zip(parts, numbers, strict=True)
        )


def _beside(sizes: Sizes, part: Part, group: _Group, text: Text) -> float:
    """How often `billhook.engine.dense_stream` runs a layer: in both streams for each later group, for the last one as
    well where it writes into the stream of the model; once for each kind of experts; in the dense stream to its end; on
    a batch to find groups and those that write.
    """
    pairs = max(group.all - group.experts - 1 - group.number, 0)
    whole = group.number + 1 == group.all and not group.experts and part.out == sizes.width
    return 2 * (pairs + whole) + group.experts + 1 + (1 + 2 * group.tried) / text.batches


def _forward(sizes: Sizes, part: Part, text: Text, passes: float, kind: str = "product") -> Iterator[Count]:
    """A layer's part of so many passes of the text; the first of a block does attention as well."""
    yield kind, "windows", part, passes * 2.0 * part.weights * part.share * text.tokens
    if part.number == 0:
        yield "attention", "windows", part, passes * 4.0 * text.length * text.tokens * sizes.width
    yield "elements", "windows", part, passes * (part.out + part.inputs) * part.share * text.tokens
    yield "call", "windows", part, passes * text.batches


def predict(sizes: Sizes, text: Text, *, logits: float = 1.0, backward: bool = False) -> Iterator[Count]:
    """The whole model on a text, to its predictions, by every process; `logits` is how often these are read, `backward`
    goes back."""
    passes, kind = (BACKWARD_PASSES, "backward") if backward else (1, "product")
    for part in sizes.parts:
        for name, _, _, amount in _forward(sizes, part, text, passes, kind):
            yield name, "all", part, amount
    yield kind, "all", None, passes * 2.0 * text.tokens * sizes.vocabulary * sizes.width
    yield "logits", "all", None, logits * text.tokens * sizes.vocabulary


def refine(sizes: Sizes, text: Text, epochs: int) -> Iterator[Count]:
    """Tuning every block, in float32: its targets, the held-out windows before, after and after each epoch, and
    `epochs` passes forward and back of the other windows, with a step of Adam after every few.

    Each time the next block runs on the outputs and is gone back through; behind the last one the predictions are made
    of outputs and targets, and once again on the way back.
    """
    held = Text(text.windows // HELD, text.length)
    learned = Text(text.windows - held.windows, text.length, STEP)
    for part in sizes.parts:
        follows = part.block > sizes.parts[0].block
        yield from _forward(sizes, part, text, 1 + follows)
        yield from _forward(sizes, part, held, (1 + follows) * (epochs + 3), "train")
        yield from _forward(sizes, part, learned, (BACKWARD_PASSES + 2 * follows) * epochs, "train")
        yield "elements", "all", part, float(ADAM * epochs * learned.batches * part.weights)
    for tokens, made, back in ((held.tokens * (epochs + 3), 2, 0), (learned.tokens * epochs, 4, 1)):
        yield "backward", "all", None, (made + back) * 2.0 * tokens * sizes.vocabulary * sizes.width
        yield "logits", "all", None, 2.0 * (made + back) * tokens * sizes.vocabulary


def read(sizes: Sizes) -> Iterator[Count]:
    """Reading a model block by block."""
    yield "file", "all", None, READING * sizes.bytes


def written(sizes: Sizes) -> Iterator[Count]:
    """Reading a model and writing the result with its records."""
    yield "file", "all", None, float(sizes.bytes)
    yield "layer", "all", None, float(len(sizes.parts))
    yield "run", "all", None, 1.0


def sent(sizes: Sizes, method: Method) -> Iterator[Count]:
    """What each process sends: sums of statistics there and back, gradients, and every pruned layer once."""
    grams = sum(4 * part.inputs**2 for part in sizes.parts if part.leads) if "gram" in method.statistics else 0
    yield "link", "all", None, 2.0 * grams
    yield "link", "all", None, 2.0 * 4 * sizes.weights if method.gradients else 0.0
    yield "link", "all", None, 0.0 if method.dense else float(sizes.itemsize * sizes.weights)


def llama(
    width: int, inner: int, blocks: int, *, vocabulary: int = 32000, keys: int | None = None, itemsize: int = 2
) -> Sizes:
    """A model of the Llama family with a head of its own; `keys` is the width of keys and values where it is
    smaller."""
    keys = width if keys is None else keys
    shapes = [
        (width, width),
        (keys, width),
        (keys, width),
        (width, width),
        (inner, width),
        (inner, width),
        (width, inner),
    ]
    own = [(*shape, lead) for shape, lead in zip(shapes, (True, False, False, True, True, False, True), strict=True)]
    parts = [Part(out, size, block, n, 1.0, lead) for block in range(blocks) for n, (out, size, lead) in enumerate(own)]
    outside = 2 * vocabulary * width * itemsize
    whole = outside + itemsize * sum(part.weights for part in parts)
    return Sizes(tuple(parts), blocks, width, itemsize, outside, whole, vocabulary)
