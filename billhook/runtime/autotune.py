"""Choose the fastest way to multiply on this machine, by a short measurement when a model is loaded.

A choice is valid for a shape, a sparsity rounded to tenths, the dtypes of values and activations (and the group size of
int8 scales), and a bucket of token counts. It is measured on the first rows of a layer, a few milliseconds per way;
ways with similar times are measured again on more rows. Only choices whose best time was reproduced are stored on disk,
so that temporary load on the machine does not affect later runs. Without a measurement, a fixed rule decides.
"""

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from billhook.runtime import cache, library
from billhook.runtime.layout import MIN_GROUP, PADDING
from billhook.runtime.native import Weight
from billhook.runtime.products import WAYS, ways

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 512)  # upper limits of token counts
FUSED_UP_TO = 16  # tokens, without a measurement
SAMPLE = 1 << 22  # weights in the rows of the first measurement
LARGE_SAMPLE = 1 << 24  # weights in the rows of the second measurement
MIN_ROUNDS, MAX_ROUNDS = 3, 9
REPRODUCED = 1.1  # the second best time lies within this factor of the best
CLOSE = 1.2  # factor of the fastest way's time within which a way is timed again on more rows
CONTENDER = 1.5  # factor within which a way must reproduce its best time
DROPPED = 2.5  # factor beyond which a way is dropped after two rounds

_measured: dict[str, str] = {}
_unstable: set[str] = set()  # keys in _measured whose best time was not reproduced
_stored: dict[str, str] = {}  # the part of _measured that is in the cache on disk


def bucket(tokens: int) -> int:
    """The bucket of a token count."""
    return next((limit for limit in BUCKETS if tokens <= limit), BUCKETS[-1])


def key(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """The name of a choice, such as `4096x4096 bfloat16 0.7 bfloat16 x16`."""
    values = weight.tensors[0]
    kept = (values.numel() - PADDING // values.element_size()) / max(1, weight.shape[0] * weight.shape[1])
    kind = "dense" if weight.tensors[1] is None else f"{round(1 - kept, 1) + 0.0:.1f}"
    group = f"/{MIN_GROUP * weight.matrix.group_words}" if weight.matrix.groups > 1 else ""
    shape, names = f"{weight.shape[0]}x{weight.shape[1]}", [str(kind)[6:] for kind in (values.dtype, dtype)]
    return f"{shape} {names[0]}{group} {kind} {names[1]} x{bucket(tokens)}"


def way(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """The way in which a packed weight is multiplied with `tokens` tokens of activations in `dtype`."""
    found, known = _measured.get(key(weight, dtype, tokens)), ways(weight, dtype)
    if found in known:
        return found
    if "fused" in known and tokens <= FUSED_UP_TO:
        return "fused"
    return next(way for way in ("tiled_gemm", "sparse_gemm", "tiles") if way in known)


def dense_way(weight: Weight, dtype: torch.dtype, tokens: int) -> str:
    """`ours` or `torch`: the kernel that multiplies a dense bfloat16 weight with `tokens` tokens."""
    return "ours" if library.active() and _measured.get(key(weight, dtype, tokens)) == "ours" else "torch"


def product(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a packed weight, plus bias -> [..., out], in the chosen way."""
    return WAYS[_choice(weight, x, way)](weight, x, bias)


def dense_product(weight: Weight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times a dense bfloat16 weight, plus bias -> [..., out], by the chosen kernel."""
    if _choice(weight, x, dense_way) == "ours":
        return weight.multiply(x, bias)
    return linear(x, weight.tensors[0].to(x.dtype), bias)


def _choice(weight: Weight, x: Tensor, choose: Callable[[Weight, torch.dtype, int], str]) -> str:
    """The choice for x [..., in], cached on the weight, because a small product takes only microseconds."""
    state = (len(_measured), library.path_number())
    if weight.chosen_for != state:
        weight.chosen_for = state
        weight.chosen.clear()
    case = (x.dtype, x.numel() // weight.shape[1])
    chosen = weight.chosen.get(case)
    if chosen is None:
        chosen = weight.chosen[case] = choose(weight, *case)
    return chosen


def measure_packed(weight: Weight, dtype: torch.dtype) -> None:
    """Measure the fastest way for every bucket without a choice."""
    few, more = _first_rows(weight, SAMPLE), _first_rows(weight, LARGE_SAMPLE)
    for tokens in BUCKETS:
        name = key(weight, dtype, tokens)
        if name not in _measured:
            x = torch.ones(tokens, weight.shape[1], dtype=dtype)
            close = _measure(name, {way: functools.partial(WAYS[way], few, x, None) for way in ways(few, dtype)})
            if len(close) > 1 and more.shape[0] > few.shape[0]:
                _measure(name, {way: functools.partial(WAYS[way], more, x, None) for way in close})


def measure_dense(weight: Weight, dtype: torch.dtype) -> bool:
    """Choose our kernel or torch's for a dense weight in every bucket; returns whether ours is faster for one token."""
    for tokens in BUCKETS:
        name = key(weight, dtype, tokens)
        if name not in _measured:
            sample = _first_rows(weight, SAMPLE)
            x = torch.ones(tokens, weight.shape[1], dtype=dtype)
            theirs = functools.partial(linear, x, sample.tensors[0].to(dtype))
            _measure(name, {"torch": theirs, "ours": functools.partial(sample.multiply, x, None)})
    return _measured[key(weight, dtype, 1)] == "ours"


def _first_rows(weight: Weight, weights: int) -> Weight:
    rows, columns = max(1, min(weight.shape[0], weights // weight.shape[1])), weight.shape[1]
    values, bitmask, starts, scales = weight.tensors
    if bitmask is None or starts is None:
        return Weight(rows, columns, values[:rows])
    return Weight(rows, columns, values, bitmask[:rows], starts[: rows + 1], None if scales is None else scales[:rows])


def _measure(name: str, candidates: dict[str, Callable[[], Tensor]]) -> list[str]:
    """Record the fastest candidate under `name`; returns the candidates with similar times.

    Candidates are timed in turn until the best times are reproduced or MAX_ROUNDS is reached.
    """
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    _unstable.discard(name)
    for turn in range(MAX_ROUNDS + 1):
        for candidate in times:
            start = time.perf_counter()
            candidates[candidate]()
            if turn:  # the first turn warms up
                times[candidate].append(time.perf_counter() - start)
        if turn == 2:
            times = {candidate: times[candidate] for candidate in _within(DROPPED, times)}
        if turn >= MIN_ROUNDS and _reproduced(times):
            break
    else:
        _unstable.add(name)
    _measured[name] = min(times, key=lambda candidate: min(times[candidate]))
    return _within(CLOSE, times)


def _within(factor: float, times: dict[str, list[float]]) -> list[str]:
    """The candidates whose best time is within `factor` of the best of all."""
    limit = factor * min(min(seen) for seen in times.values())
    return [candidate for candidate, seen in times.items() if min(seen) <= limit]


def _reproduced(times: dict[str, list[float]]) -> bool:
    """Whether each candidate that may be the fastest reached its best time twice."""
    best = [sorted(seen)[:2] for seen in times.values()]
    fastest = min(first for first, _ in best)
    return all(second <= REPRODUCED * first for first, second in best if first <= CONTENDER * fastest)


def load_choices() -> None:
    """Read what earlier runs measured on this machine."""
    _stored.update(cache.load("kernels"))
    _measured.update(_stored)


def store_choices() -> None:
    """Store new choices whose best time was reproduced."""
    known = {name: way for name, way in _measured.items() if name not in _unstable}
    if known.items() - _stored.items():
        cache.store("kernels", known)
        _stored.update(known)


def clear_choices() -> None:
    """Drop all choices of this process: for tests, and after the number of threads changed."""
    for known in (_measured, _stored, _unstable):
        known.clear()
