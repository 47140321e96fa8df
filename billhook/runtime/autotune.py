"""Which way to multiply is fastest here: a short measurement at load, kept per machine.

A choice belongs to a shape, a tenth of sparsity, the dtypes (and columns a scale of int8) and a bucket of token counts
(each bucket up to its number). It is measured on the layer's first rows, a few milliseconds a way; where ways come out
close, on more rows, because few rows do not show what many tiles cost. It is kept where the least times could be
repeated, so that a busy moment is not remembered for ever; what was not measured follows a rule that was right on the
machines at hand.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from billhook.runtime import cache, library
from billhook.runtime.native import Weight
from billhook.runtime.products import WAYS, ways

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
FUSED_UP_TO = 16  # tokens, unless measured
SAMPLE, LARGE_SAMPLE = (
    1 << 22,
    1 << 24,
)  # weights that a measurement multiplies at most, at first and where ways are close
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
AGREE = 1.1  # times the least, within which the second least time must lie
CLOSE, NEAR, FAR = (
    1.2,
    1.5,
    2.5,
)  # times the least time of all: timed again on more rows, timed well, given up after two rounds

_measured: dict[str, str] = {}
_doubtful: set[str] = set()  # of those, what was measured while something else disturbed, and is not kept
_stored: dict[str, str] = {}  # of those, what the cache holds


def bucket(tokens: int) -> int:
    """The token count that stands for `tokens`."""
    return next((limit for limit in BUCKETS if tokens <= limit), BUCKETS[-1])


def key(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """The name of a choice, such as `4096x4096 bfloat16 0.7 bfloat16 x16`."""
    values = weight.tensors[0]
    kept = (values.numel() - 64 // values.element_size()) / max(1, weight.shape[0] * weight.shape[1])
    kind = "dense" if weight.tensors[1] is None else f"{round(1 - kept, 1) + 0.0:.1f}"
    group = f"/{64 * weight.matrix.group_words}" if weight.matrix.groups > 1 else ""
    return (
        f"{weight.shape[0]}x{weight.shape[1]} {str(values.dtype)[6:]}{group} {kind} {str(dtype)[6:]} x{bucket(tokens)}"
    )


def way(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """The way that a packed weight is multiplied with `tokens` tokens."""
    found, known = _measured.get(key(weight, dtype, tokens)), ways(weight, dtype)
    if found in known:
        return found
    if "fused" in known and tokens <= FUSED_UP_TO:
        return "fused"
    return next(way for way in ("many", "kept", "tiles") if way in known)


def product(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out] the best way."""
    return WAYS[_remembered(weight, x, way)](weight, x, bias)


def dense_product(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a dense bfloat16 weight, by our kernel where that was measured to be faster than torch's."""
    if _remembered(weight, x, dense_way) == "ours":
        return weight.multiply(x, bias)
    return linear(x, weight.tensors[0].to(x.dtype), bias)


def dense_way(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """`ours` or `torch`: what multiplies a dense bfloat16 weight with `tokens` tokens."""
    return "ours" if library.active() and _measured.get(key(weight, dtype, tokens)) == "ours" else "torch"


def _remembered(weight: Weight, x: Tensor, choose: Callable[[Weight, torch.dtype, int], str]) -> str:
    """The choice for x [..., in], looked up once per weight and token count: the product itself may take
    microseconds."""
    state = (len(_measured), library.path_number())
    if weight.chosen_for != state:
        weight.chosen_for = state
        weight.chosen.clear()
    asked = (x.dtype, x.numel() // weight.shape[1])
    chosen = weight.chosen.get(asked)
    if chosen is None:
        chosen = weight.chosen[asked] = choose(weight, *asked)
    return chosen


def measure_packed(weight: Weight, dtype: torch.dtype) -> None:
    """Find the best way for every bucket that is not known yet."""
    few, more = _first_rows(weight, SAMPLE), _first_rows(weight, LARGE_SAMPLE)
    for tokens in BUCKETS:
        name = key(weight, dtype, tokens)
        if name not in _measured:
            x = torch.ones(tokens, weight.shape[1], dtype=dtype)
            close = _choose(name, {way: functools.partial(WAYS[way], few, x, None) for way in ways(few, dtype)})
            if len(close) > 1 and more.shape[0] > few.shape[0]:
                _choose(name, {way: functools.partial(WAYS[way], more, x, None) for way in close})


def measure_dense(weight: Weight, dtype: torch.dtype) -> bool:
    """Find for every bucket whether our kernel beats torch's on a dense weight; True where it does for a single
    token."""
    for tokens in BUCKETS:
        name = key(weight, dtype, tokens)
        if name not in _measured:
            sample = _first_rows(weight, SAMPLE)
            x = torch.ones(tokens, weight.shape[1], dtype=dtype)
            theirs = functools.partial(linear, x, sample.tensors[0].to(dtype))
            _choose(name, {"torch": theirs, "ours": functools.partial(sample.multiply, x, None)})
    return _measured[key(weight, dtype, 1)] == "ours"


def _first_rows(weight: Weight, weights: int) -> Weight:
    rows = max(1, min(weight.shape[0], weights // weight.shape[1]))
    values, bitmask, starts, scales = weight.tensors
    if bitmask is None or starts is None:
        return Weight(rows, weight.shape[1], values[:rows])
    return Weight(
        rows, weight.shape[1], values, bitmask[:rows], starts[: rows + 1], None if scales is None else scales[:rows]
    )


def _choose(name: str, candidates: dict[str, Callable[[], Tensor]]) -> list[str]:
    """Note the candidate with the least time, tried in turns until the times can be trusted or there were enough
    rounds.

    Returns those that came close to it.
    """
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    _doubtful.discard(name)
    for turn in range(MOST_ROUNDS + 1):
        for candidate in times:
            start = time.perf_counter()
            candidates[candidate]()
            if turn:  # the first turn warms up
                times[candidate].append(time.perf_counter() - start)
        if turn == 2:
            times = {candidate: times[candidate] for candidate in _within(FAR, times)}
        if turn >= LEAST_ROUNDS and _repeated(times):
            break
    else:
        _doubtful.add(name)
    _measured[name] = min(times, key=lambda candidate: min(times[candidate]))
    return _within(CLOSE, times)


def _within(factor: float, times: dict[str, list[float]]) -> list[str]:
    """The candidates whose least time is within `factor` of the least of all."""
    limit = factor * min(min(seen) for seen in times.values())
    return [candidate for candidate, seen in times.items() if min(seen) <= limit]


def _repeated(times: dict[str, list[float]]) -> bool:
    """Whether each candidate that may be the fastest took its least time twice."""
    least = [sorted(seen)[:2] for seen in times.values()]
    fastest = min(first for first, _ in least)
    return all(second <= AGREE * first for first, second in least if first <= NEAR * fastest)


def recall() -> None:
    """Read what earlier runs measured on this machine."""
    _stored.update(cache.load("kernels"))
    _measured.update(_stored)


def keep() -> None:
    """Store what was measured since, as far as it can be trusted."""
    known = {name: way for name, way in _measured.items() if name not in _doubtful}
    if known.items() - _stored.items():
        cache.store("kernels", known)
        _stored.update(known)


def forget() -> None:
    """Drop all choices of this process, for tests and after the number of threads changed."""
    for known in (_measured, _stored, _doubtful):
        known.clear()
