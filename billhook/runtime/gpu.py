"""Packed layers on a CUDA device: the fastest way for each layer and number of tokens, measured once and cached.

Up to 16 tokens are multiplied directly from the packed form where that is faster, otherwise through a temporary dense
weight (see `gpu_ops.py`). A layer with a 2:4 mask may also use the sparse tensor cores, in the form of
`torch.sparse.to_sparse_semi_structured`, for token counts for which that is faster; this form needs another 9/16 of the
dense bytes. Measurements are cached by card, shape and density (rounded to 5 %).

Nothing is measured while a CUDA graph is captured or under `torch.compile`: call `prepare` on the layers before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from billhook.runtime import cache, native
from billhook.runtime.fallback import unpack_bits
from billhook.runtime.gpu_ops import BUCKETS, EXPAND, Weight, chunk_table, expand, kernels, missing

__all__ = ["choose", "forward", "missing", "prepare", "ways"]

Timer = Callable[[Callable[[], object]], float]  # the time of a call, in any unit
_FEW = ("matmat-64x8", "matmat-64x4")
CANDIDATES = {1: ("matvec-2x4", "matvec-4x4", "matvec-8x4", "matvec-4x8"), 4: _FEW, 16: _FEW}
UNTIMED = "matvec-4x4 matmat-64x8 matmat-64x8"
MANY_TOKENS = (32, 128, 512)  # for which 2:4 is measured against expanding


class Layer(Protocol):
    """The attributes of a `SparseLinear` that are read here."""

    in_features: int
    out_features: int
    bitmask: Tensor
    values: Tensor
    row_starts: Tensor
    scales: Tensor | None
    bias: Tensor | None


@dataclass
class State:
    """The state of a layer on its device, invalid when the layer's `row_starts` is another tensor.

    `ways` is keyed by the dtypes of values and activations.
    """

    row_starts: Tensor
    table: Tensor
    group: int
    ways: dict[tuple[torch.dtype, torch.dtype], str] = field(default_factory=dict)
    semi_structured: Tensor | None = None
    semi_structured_from: int = 0


def forward(layer: Layer, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out], in the dtype of x."""
    state = prepare(layer, x.dtype)
    flat = x.reshape(-1, layer.in_features)
    form = state.semi_structured
    if form is not None and x.dtype == form.dtype and len(flat) >= state.semi_structured_from:
        y = F.linear(flat, form, layer.bias)
    else:
        tensors, ways = (layer.bitmask, layer.values, state.table, layer.scales, layer.bias), state.ways
        y = torch.ops.billhook.gpu_linear(flat, *tensors, group=state.group, ways=ways[layer.values.dtype, x.dtype])
    return y.view(*x.shape[:-1], layer.out_features)


def prepare(layer: Layer, dtype: torch.dtype) -> State:
    """Make a layer's table and choose its ways for activations of `dtype`, if not done before."""
    state = layer.__dict__.get("gpu_state")
    if state is None or state.row_starts is not layer.row_starts:
        state = _attach(layer)
    if (layer.values.dtype, dtype) not in state.ways:
        _choose_ways(layer, state, dtype, measure=not torch.compiler.is_compiling())
    return state


@torch.compiler.disable
def _attach(layer: Layer) -> State:
    """Make the table of chunks on the layer's device; a scale of a whole row becomes one group as wide as the row."""
    group = 0
    if layer.scales is not None:
        group = 1 << (native.group_size(layer.scales, layer.in_features) - 1).bit_length()
    state = State(layer.row_starts, chunk_table(layer.bitmask, layer.row_starts), max(group, 8) if group else 0)
    layer.__dict__["gpu_state"] = state
    return state


@torch.compiler.disable
def _choose_ways(layer: Layer, state: State, dtype: torch.dtype, measure: bool) -> None:
    """Choose the ways for a dtype of activations, and make the 2:4 form if it is chosen."""
    if measure and not (layer.bitmask.is_cuda and torch.cuda.is_current_stream_capturing()):
        weight = Weight(layer.bitmask, layer.values, state.table, layer.scales, state.group)
        words = choose(weight, layer.in_features, dtype).split()
        if len(words) > len(BUCKETS):
            state.semi_structured = semi_structured(weight, layer.in_features, dtype)
            state.semi_structured_from = int(words.pop().partition("-")[2])
    else:
        words = UNTIMED.split()
    state.ways[layer.values.dtype, dtype] = " ".join(words)


def choose(weight: Weight, columns: int, dtype: torch.dtype, timer: Timer | None = None) -> str:
    """The fastest way for each of BUCKETS tokens, one word each, and `2:4-N` if the 2:4 form is faster from N tokens.

    Read from the cache, or measured with random activations of `dtype`; interpreted kernels only with a `timer`.
    """
    if kernels(weight.bitmask.device) is None:
        return " ".join([EXPAND] * len(BUCKETS))
    if timer is None and not weight.bitmask.is_cuda:
        return UNTIMED
    timer = timer or _median
    name, key = f"gpu-1-{_card(weight.bitmask.device)}", _key(weight, columns, dtype)
    known = cache.load(name)
    if key not in known:
        words = [_fastest(weight, columns, dtype, tokens, timer) for tokens in BUCKETS]
        known[key] = " ".join(words + _semi_structured_word(weight, columns, dtype, timer))
        cache.store(name, known)
    return known[key]


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "-") if device.type == "cuda" else "interpreted"


def _key(weight: Weight, columns: int, dtype: torch.dtype) -> str:
    rows = weight.bitmask.shape[0]
    kept = weight.values.numel() / (rows * columns)
    names = " ".join(str(kind).removeprefix("torch.") for kind in (weight.values.dtype, dtype))
    pattern = "2:4" if _is_two_of_four(weight, columns) else f"keep {round(kept * 20) * 5} %"
    return f"{rows}x{columns} {pattern} {names} group {weight.group}"


def _is_two_of_four(weight: Weight, columns: int) -> bool:
    """Whether the mask is 2:4, in a shape that the sparse tensor cores support."""
    rows = weight.bitmask.shape[0]
    if rows % 64 or columns % 64 or weight.values.numel() > 0.6 * rows * columns:
        return False
    return int(unpack_bits(weight.bitmask, columns).view(rows, -1, 4).sum(-1).max()) <= 2


def _median(call: Callable[[], object]) -> float:
    """Median time in milliseconds, with the L2 cache cleared before each run, as between the layers of a model."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def _fastest(weight: Weight, columns: int, dtype: torch.dtype, tokens: int, timer: Timer) -> str:
    from triton.errors import TritonError

    x = torch.randn(tokens, columns, device=weight.bitmask.device).to(dtype)
    best, least = EXPAND, math.inf
    for way in (*CANDIDATES[tokens], EXPAND):
        try:
            taken = timer(partial(_run, weight, x, way))
        except TritonError:  # too large for this card
            continue
        if taken < least:
            best, least = way, taken
    return best


def _run(weight: Weight, x: Tensor, way: str) -> Tensor:
    tensors, ways = (weight.bitmask, weight.values, weight.table, weight.scales), " ".join([way] * len(BUCKETS))
    return torch.ops.billhook.gpu_linear(x, *tensors, None, group=weight.group, ways=ways)


def semi_structured(weight: Weight, columns: int, dtype: torch.dtype) -> Tensor | None:
    """The weight in torch's 2:4 form, or None where mask, card, shape or dtype do not support it."""
    half = dtype in (torch.float16, torch.bfloat16)
    if not (weight.bitmask.is_cuda and half and _is_two_of_four(weight, columns)):
        return None
    try:
        return torch.sparse.to_sparse_semi_structured(expand(weight, columns, dtype))
    except (RuntimeError, NotImplementedError):  # this build or card has no such kernels
        return None


def _semi_structured_word(weight: Weight, columns: int, dtype: torch.dtype, timer: Timer) -> list[str]:
    form = semi_structured(weight, columns, dtype)
    if form is None:
        return []
    first = None
    for tokens in reversed(MANY_TOKENS):
        x = torch.randn(tokens, columns, device=weight.bitmask.device).to(dtype)
        if timer(partial(F.linear, x, form)) >= timer(partial(_run, weight, x, EXPAND)):
            break
        first = tokens
    return [] if first is None else [f"2:4-{first}"]


def ways(layer: Layer, dtype: torch.dtype) -> dict[int, str]:
    """The ways chosen for a layer, by the largest number of tokens."""
    state = prepare(layer, dtype)
    many = EXPAND if state.semi_structured is None else f"2:4 from {state.semi_structured_from}"
    found = zip(BUCKETS, state.ways[layer.values.dtype, dtype].split(), strict=True)
    return {**dict(found), MANY_TOKENS[-1]: many}
