"""The kernels for packed weights: every instruction set this processor runs, and plain torch, against sums in float64.

Stated tolerance of a product: 2^-20 of the sum of absolute terms, and the rounding to the dtype of the activations,
once before and once after the bias; where int8 values pass through torch's dense tiles, or through ours with several
scales a row, also the rounding of every weight to that dtype.
"""

import multiprocessing
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_layers import assert_product, layer, random_weight
from torch import Tensor

from billhook.runtime import autotune, fallback, library, native, products
from billhook.runtime.linear import SparseLinear
from billhook.runtime.native import Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


SHAPES = ((1, 1), (5, 1), (1, 64), (7, 130), (64, 300), (3, 1000), (70, 2048))


PATHS = ("avx512_bf16", "avx512_vbmi2", "avx512", "avx2", "neon", "portable", "torch")


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set after another, and plain torch."""
    if request.param not in library.paths():
        pytest.skip(f"the kernels {request.param} do not run on this machine")
    with library.forced(request.param):
        yield request.param


def test_every_instruction_set_is_tried():
    assert set(library.paths()) <= set(PATHS)


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BILLHOOK_CACHE", "0")
    autotune.clear_choices()
    yield
    autotune.clear_choices()


def random_scales(shape: tuple[int, int], group: int | None) -> Tensor:
    size = (shape[0],) if group is None else (shape[0], -(-shape[1] // group))
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5


def spread(scales: Tensor, group: int | None, columns: int) -> Tensor:
    return scales[:, None] if group is None else scales.repeat_interleave(group, 1)[:, :columns]


@pytest.mark.parametrize("values", [*FLOATS, torch.int8], ids=str)
def test_products_agree_with_float64(path: str, values: torch.dtype):
    for shape in SHAPES:
        for share, group in ((0.0, None), (0.1, 64), (0.5, 128), (1.0, None)):
            W = random_weight(shape, share, values)
            scales = random_scales(shape, group) if values == torch.int8 else None
            exact = W.double() if scales is None else W.double() * spread(scales, group, shape[1]).double()
            for dtype in FLOATS:
                bias = torch.linspace(-1, 1, shape[0]).to(dtype)
                packed = layer(W, scales, bias)
                for tokens in (1, 2, 3, 8, 9):
                    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
                    assert_product(packed(x), x, exact, bias, rounded=path == "torch" and scales is not None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", range(10))
def test_all_batch_sizes_and_kernels_agree_with_float64(path: str, tokens: int, dtype: torch.dtype):
    W, bias = random_weight((40, 200), 0.4, dtype), torch.linspace(-1, 1, 40).to(dtype)
    packed, x = layer(W), torch.randn(tokens, 200).to(dtype)
    if tokens == 0:
        assert packed(x).shape == (0, 40)
        return
    for way in products.ways(packed.packed(), x.dtype):
        assert_product(products.WAYS[way](packed.packed(), x, bias), x, W.double(), bias)


@pytest.mark.gate
@pytest.mark.parametrize("way", ["tiled_gemm", "sparse_gemm"])
@pytest.mark.parametrize(
    ("values", "group"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, None),
        (torch.int8, None),
        (torch.int8, 64),
        (torch.int8, 4096),
    ],
    ids=str,
)
def test_many_tokens_agree_with_float64(
    path: str, way: str, values: torch.dtype, group: int | None, monkeypatch: pytest.MonkeyPatch
):
    dtype = torch.bfloat16 if way == "tiled_gemm" or values == torch.int8 else values
    multiply = products.WAYS[way]
    for shape in (*SHAPES, (101, 200), (6, 30000)):
        W = random_weight(shape, 0.5, values)
        scales = random_scales(shape, group) if values == torch.int8 else None
        exact = W.double() if scales is None else W.double() * spread(scales, group, shape[1]).double()
        packed, bias = layer(W, scales).packed(), torch.linspace(-1, 1, shape[0]).to(dtype)
        if way not in products.ways(packed, dtype):
            pytest.skip(f"the kernels {path} have no {way} for {dtype}")
        for tokens in (1, 15, 33, 64, 131):
            x = torch.randn(1, tokens, shape[1] + 3, generator=torch.Generator().manual_seed(tokens)).to(dtype)[
                ..., : shape[1]
            ]
            y = multiply(packed, x, bias)
            assert y.shape == (1, tokens, shape[0])
            assert_product(
                y[0],
                x[0],
                exact,
                bias,
                rounded=way == "tiled_gemm" and scales is not None and scales.numel() > shape[0],
            )
            monkeypatch.setattr(products, "GEMM_TOKENS", 64)  # in parts: the same sums
            assert torch.equal(multiply(packed, x[0], bias), y[0])
            monkeypatch.undo()


def test_sums_of_one_sign_do_not_drift(path: str):
    W, x = torch.rand(3, 20000), torch.rand(64, 20000)
    packed = layer(W).packed()
    for way in products.ways(packed, torch.float32):
        assert_product(products.WAYS[way](packed, x, None), x, W.double())


def test_dense_kernel_agrees_with_float64(path: str):
    if path == "torch":
        pytest.skip("plain torch has no dense kernel of its own")
    for shape in SHAPES:
        W = random_weight(shape, 1.0, torch.bfloat16)
        for dtype in FLOATS:
            for tokens in (1, 2, 5, 8, 11):
                x = torch.randn(tokens, shape[1]).to(dtype)
                assert_product(Weight(*shape, W).multiply(x, None), x, W.double())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_packing_gives_the_same_bytes_everywhere(path: str, dtype: torch.dtype):
    for shape in SHAPES:
        W = random_weight(shape, 0.5, dtype)
        if dtype.is_floating_point:
            W[0, 0] = -0.0  # bytes that are not all zero
        bitmask, values = native.pack(W)
        plain = fallback.pack(W)
        assert torch.equal(bitmask, plain[0])
        assert values.view(torch.uint8).equal(plain[1].view(torch.uint8))
        starts = native.row_starts(bitmask, shape[1])
        assert torch.equal(starts, fallback.row_starts(bitmask))
        scales = torch.ones(shape[0]) if dtype == torch.int8 else None
        for rows in (slice(None), slice(shape[0] // 3, shape[0])):
            dense = native.expand(bitmask, values, starts, shape[1], rows=rows, scales=scales).to(dtype)
            assert dense.view(torch.uint8).equal(W[rows].view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 17),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_products_of_any_shape_agree_with_float64(rows: int, columns: int, tokens: int, share: float, seed: int):
    W = random_weight((rows, columns), share, torch.bfloat16, seed)
    packed = layer(W)
    assert torch.equal(packed.dense(), W)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert_product(packed(x), x, W.double())


def test_special_values_pass_through(path: str):
    W = torch.zeros(2, 70, dtype=torch.bfloat16)
    W[0, 3], W[1, 69] = float("inf"), 1.0
    x = torch.zeros(1, 70, dtype=torch.bfloat16)
    x[0, 3], x[0, 69] = -2.0, float("nan")
    y = layer(W)(x)
    assert y[0, 1].isnan()
    with library.forced("torch"):
        assert layer(W)(x[:, :70].nan_to_num()).tolist() == [[float("-inf"), 0.0]]
    assert layer(W)(x.nan_to_num()).tolist() == [[float("-inf"), 0.0]]


def test_inputs_of_any_layout_give_the_same_products(path: str):
    W = random_weight((33, 100), 0.5, torch.bfloat16)
    packed, wide = layer(W), torch.randn(6, 4, 200).bfloat16()
    for x in (
        wide[:, :, ::2],
        wide[:, 1:3, 50:150],
        wide[..., :100].transpose(0, 1),
        wide[0, :, :100].T.contiguous().T,
        wide[2, 3, :100],
    ):
        y = packed(x)
        assert y.shape == (*x.shape[:-1], 33)
        assert_product(y.reshape(-1, 33), x.reshape(-1, 100), W.double())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_bit(path: str, threads: int):
    W = random_weight((600, 2048), 0.6, torch.bfloat16)
    packed, few, lot = layer(W), torch.randn(3, 2048).bfloat16(), torch.randn(70, 2048).bfloat16()
    one = packed(few)
    ways = [way for way in ("tiled_gemm", "sparse_gemm") if way in products.ways(packed.packed(), lot.dtype)]
    alone = {way: products.WAYS[way](packed.packed(), lot, None) for way in ways}
    torch.set_num_threads(threads)
    try:
        assert torch.equal(packed(few), one) or path == "torch"
        assert_product(packed(few), few, W.double())
        for way, y in alone.items():
            assert torch.equal(products.WAYS[way](packed.packed(), lot, None), y)
    finally:
        torch.set_num_threads(1)


def _in_child(packed: SparseLinear, x: Tensor, queue: "multiprocessing.queues.Queue[list[float]]") -> None:
    queue.put(packed.packed().multiply(x, None).flatten().tolist())


@pytest.mark.skipif(not hasattr(os, "fork") or library.active() is None, reason="needs fork and compiled kernels")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_kernels_work_in_forked_processes():
    W = random_weight((600, 2048), 0.6, torch.bfloat16)
    packed, x = layer(W), torch.randn(1, 2048).bfloat16()
    torch.set_num_threads(2)
    try:
        parent = packed(x)  # threads have run before the fork
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(packed, x, queue))
        child.start()
        child.join(timeout=240)
        alive = child.is_alive()
        child.kill()
        assert not alive, "the forked child hangs"
        assert queue.get() == parent.flatten().tolist()
    finally:
        torch.set_num_threads(1)
