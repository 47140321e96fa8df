"""The kernels for packed weights: every instruction set this processor runs, and plain torch, against sums in float64.

Stated tolerance of a product: 2^-20 of the sum of absolute terms, and the rounding to the dtype of the activations,
once before and once after the bias; where int8 values pass through torch's dense tiles, or through ours with several
scales a row, also the rounding of every weight to that dtype.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from billhook.errors import BillhookError
from billhook.runtime import autotune, fallback, library, native, ops, products
from billhook.runtime.dense import DenseLinear, adopt_
from billhook.runtime.linear import SparseLinear
from billhook.runtime.native import Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-22}
SHAPES = ((1, 1), (5, 1), (1, 64), (7, 130), (64, 300), (3, 1000), (70, 2048))


@pytest.fixture(params=library.paths())
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set after another, and plain torch."""
    with library.forced(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BILLHOOK_CACHE", "0")
    autotune.clear_choices()
    yield
    autotune.clear_choices()


def random_weight(shape: tuple[int, int], share: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values of which `share` are kept; the first row is empty, the last one full."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    W[torch.rand(shape, generator=generator) >= share] = 0
    W[0] = 0
    W[-1] = torch.randn(shape[1], generator=generator)
    if dtype == torch.int8:
        W = (40 * W).round().clamp(-127, 127)
        W[-1, 0] = -128
    return W.to(dtype)


def random_scales(shape: tuple[int, int], group: int | None) -> Tensor:
    size = (shape[0],) if group is None else (shape[0], -(-shape[1] // group))
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.5


def spread(scales: Tensor, group: int | None, columns: int) -> Tensor:
    return scales[:, None] if group is None else scales.repeat_interleave(group, 1)[:, :columns]


def layer(W: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> SparseLinear:
    bitmask, values = native.pack(W)
    starts = native.row_starts(bitmask, W.shape[1])
    return SparseLinear(bitmask, values, starts, W.shape[1], bias=bias, scales=scales)


def assert_product(y: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None, rounded: bool = False) -> None:
    """y is x Wᵀ + bias up to the stated tolerance; W in float64, `rounded` where its entries are rounded first."""
    product = x.double() @ W.T
    exact = product + (0 if bias is None else bias.double())
    terms = x.double().abs() @ W.abs().T
    allowed = (
        terms * (2**-20 + rounded * ROUNDING[x.dtype]) + (exact.abs() + product.abs()) * ROUNDING[x.dtype] + 2**-24
    )
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    worst = ((y.double() - exact).abs() / allowed).max()
    assert worst <= 1, f"{float(worst)} times the tolerance"


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
def test_all_batch_sizes_and_ways(path: str, tokens: int, dtype: torch.dtype):
    W, bias = random_weight((40, 200), 0.4, dtype), torch.linspace(-1, 1, 40).to(dtype)
    packed, x = layer(W), torch.randn(tokens, 200).to(dtype)
    if tokens == 0:
        assert packed(x).shape == (0, 40)
        return
    for way in products.ways(packed.packed(), x.dtype):
        assert_product(products.WAYS[way](packed.packed(), x, bias), x, W.double(), bias)


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
            pytest.skip("this instruction set has no such product for many tokens")
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
        assert native.expand(bitmask, values, starts, shape[1]).view(torch.uint8).equal(W.view(torch.uint8))
        rows = slice(shape[0] // 3, shape[0])
        assert (
            native.expand(bitmask, values, starts, shape[1], rows=rows)
            .view(torch.uint8)
            .equal(W[rows].view(torch.uint8))
        )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    tokens=st.integers(1, 17),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, columns: int, tokens: int, share: float, seed: int):
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


def test_inputs_of_any_layout(path: str):
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
def test_forked_workers_finish():
    W = random_weight((600, 2048), 0.6, torch.bfloat16)
    packed, x = layer(W), torch.randn(1, 2048).bfloat16()
    torch.set_num_threads(2)
    try:
        parent = packed(x)  # threads have run before the fork
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(packed, x, queue))
        child.start()
        child.join(timeout=60)
        alive = child.is_alive()
        child.kill()
        assert not alive, "the forked child hangs"
        assert queue.get() == parent.flatten().tolist()
    finally:
        torch.set_num_threads(1)


_RUNTIMES = """
import torch
from billhook.runtime.linear import SparseLinear
layer = SparseLinear.from_dense(torch.eye(600, 2048).bfloat16(), None)
layer(torch.randn(1, 2048).bfloat16())
for line in open("/proc/self/maps"):
    print(line.split()[-1])
"""


def test_one_openmp_runtime():
    if library.active() is None or not Path("/proc/self/maps").exists():
        pytest.skip("needs compiled kernels and /proc")
    run = subprocess.run([sys.executable, "-c", _RUNTIMES], capture_output=True, text=True, check=True)
    runtimes = {
        line for line in run.stdout.splitlines() if any(name in line for name in ("libgomp", "libomp", "libiomp"))
    }
    assert len(runtimes) == 1, runtimes


def test_the_operator_is_a_good_citizen():
    W = random_weight((96, 130), 0.4, torch.bfloat16)
    packed, x = layer(W, bias=torch.randn(96).bfloat16()), torch.randn(2, 3, 130).bfloat16()
    arguments = (x, packed.bitmask, packed.values, packed.row_starts, None, packed.bias)
    torch.library.opcheck(ops.sparse_linear, arguments)
    torch.library.opcheck(ops.dense_linear, (x, torch.randn(96, 130).bfloat16(), None))
    assert ops.sparse_linear(*[tensor if tensor is None else tensor.to("meta") for tensor in arguments]).shape == (
        2,
        3,
        96,
    )
    assert torch.equal(ops.sparse_linear(*arguments), packed(x))


def test_compiled_without_a_graph_break():
    model = torch.nn.Sequential(
        layer(random_weight((96, 130), 0.4, torch.bfloat16)), torch.nn.ReLU(), torch.nn.Linear(96, 40).bfloat16()
    )
    adopt_(model[2])
    x = torch.randn(3, 130).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))


def test_no_derivative():
    packed = layer(random_weight((8, 70), 0.4, torch.float32))
    y = packed(torch.randn(2, 70, requires_grad=True))
    with pytest.raises(BillhookError, match="inference"):
        y.sum().backward()


def test_an_adopted_layer_is_still_linear():
    linear = torch.nn.Linear(300, 50).bfloat16()
    x = torch.randn(2, 300).bfloat16()
    before = linear(x)
    names = dict(linear.state_dict())
    adopt_(linear)
    autotune._measured[autotune.key(linear._weight, torch.bfloat16, 2)] = "ours"
    assert isinstance(linear, DenseLinear)
    assert linear.state_dict().keys() == names.keys()
    with torch.no_grad():
        assert_product(linear(x), x, linear.weight.double(), linear.bias)
        linear.weight.data = linear.weight.data.clone() * 2  # moved: the kernel must see the new one
        assert_product(linear(x), x, linear.weight.double(), linear.bias)
        assert linear.float()(x.float()).dtype == torch.float32
    linear.bfloat16()(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(before).all()


def test_state_dict_round_trip_with_other_counts():
    one, two = (
        layer(random_weight((9, 130), 0.3, torch.bfloat16, 1)),
        layer(random_weight((9, 130), 0.8, torch.bfloat16, 2)),
    )
    starts = one.row_starts
    one.load_state_dict(two.state_dict())
    assert torch.equal(one.dense(), two.dense())
    assert one.row_starts is not starts
    x = torch.randn(2, 130).bfloat16()
    assert torch.equal(one(x), two(x))


def test_disagreeing_tensors_are_named():
    bitmask, values = native.pack(random_weight((9, 130), 0.3, torch.bfloat16))
    starts = native.row_starts(bitmask, 130)
    with pytest.raises(BillhookError, match="values"):
        SparseLinear(bitmask, values[:-1], starts, 130)
    with pytest.raises(BillhookError, match="rows"):
        SparseLinear(bitmask, values, starts[1:], 130)
    with pytest.raises(BillhookError, match="scales"):
        SparseLinear(bitmask, values, starts, 130, scales=torch.ones(9))
    with pytest.raises(BillhookError, match=r"uint8 \[rows, 24\]"):
        native.row_starts(bitmask[:, :16], 130)
    bitmask[4, -1] = 1
    with pytest.raises(BillhookError, match="beyond the last column"):
        native.row_starts(bitmask, 130)
    with pytest.raises(BillhookError, match="group"):
        native.group_size(torch.ones(9, 4), 130)
    packed = layer(random_weight((9, 130), 0.3, torch.bfloat16))
    damaged = packed.state_dict() | {"values": values[:-3]}
    with pytest.raises(BillhookError, match="values"):
        packed.load_state_dict(damaged)
    with pytest.raises(BillhookError, match="130"):
        packed(torch.randn(2, 131).bfloat16())
    with pytest.raises(BillhookError, match="float64"):
        packed(torch.randn(2, 130).double())


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BillhookError, match="sse9"), library.forced("sse9"):
        pass
    monkeypatch.setenv("BILLHOOK_KERNELS", "mmx")
    with pytest.raises(BillhookError, match="mmx"):
        library.path()


def test_a_library_of_another_version_is_not_used():
    if library.active() is None:
        pytest.skip("needs compiled kernels")
    code = "from billhook.runtime import library\nlibrary.SURFACE += 1\nassert library.paths() == ['torch']\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "another version" in ran.stderr


def test_without_the_library_one_line_says_what_is_missed(tmp_path: Path):
    code = (
        "import sys, pathlib, torch\n"
        "from billhook.runtime import library\n"
        f"library.FILE = pathlib.Path({str(tmp_path / '_kernels.so')!r})\n"
        "from billhook.runtime.linear import SparseLinear\n"
        "W = torch.eye(70).bfloat16()\n"
        "layer = SparseLinear.from_dense(W)\n"
        "x = torch.randn(3, 70).bfloat16()\n"
        "assert torch.equal(layer(x), x) and torch.equal(layer.dense(), W)\n"
        "assert library.paths() == ['torch'] and library.about()['path'] == 'torch'\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert "compiler" in ran.stderr
