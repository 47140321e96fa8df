"""The GPU engine: every way of multiplying against float64, on a GPU where there is one, else through Triton's
interpreter on the CPU.

Where Triton is not installed the kernels are skipped and the path in plain torch is tested alone.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.runtime import gpu, gpu_ops, native
from billhook.runtime.linear import SparseLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


TOLERANCE = {
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
    torch.float32: 1e-6,
}  # the interpreter cuts bfloat16 off, a card rounds it


KERNELS = {
    1: ("matvec-2x2", "matvec-4x4", "matmat-16x4", "expand"),
    3: ("matmat-16x4", "expand"),
    16: ("matmat-64x8",),
    17: ("expand",),
}


@pytest.fixture
def triton() -> Iterator[None]:
    """The kernels, interpreted where there is no GPU (conftest asks for that)."""
    version = getattr(pytest.importorskip("triton"), "__version__", "0")
    if DEVICE == "cpu" and tuple(int(part) for part in version.split(".")[:2]) < (3, 8):
        pytest.skip("the interpreter of Triton before 3.8 does not work with numpy 2.4")
    gpu_ops.kernels.cache_clear()
    assert gpu_ops.kernels(torch.device(DEVICE)) is not None
    yield
    gpu_ops.kernels.cache_clear()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels."""
    monkeypatch.setattr(gpu_ops, "kernels", lambda device: None)


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    W = torch.randn(rows, columns, generator=generator)
    W[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    W[rows // 2] = 0  # an empty row, and all kept weights of the next begin where the last row's end
    return W.to(dtype)


def layer_of(W: Tensor, bias: Tensor | None = None) -> SparseLinear:
    return SparseLinear.from_dense(W, bias).to(DEVICE)


def weight_of(W: Tensor) -> gpu_ops.Weight:
    bitmask, values = native.pack(W)
    table = gpu_ops.chunk_table(bitmask, native.row_starts(bitmask, W.shape[1]))
    return gpu_ops.Weight(bitmask.to(DEVICE), values.to(DEVICE), table.to(DEVICE), None, 0)


def multiply(weight: gpu_ops.Weight, x: Tensor, bias: Tensor | None, way: str) -> Tensor:
    tensors = weight.bitmask, weight.values, weight.table, weight.scales, None if bias is None else bias.to(DEVICE)
    return torch.ops.billhook.gpu_linear(
        x.to(DEVICE), *tensors, group=weight.group, ways=" ".join([way] * len(gpu_ops.BUCKETS))
    ).cpu()


def difference(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def check_product(W: Tensor, dtype: torch.dtype) -> None:
    weight, bias = weight_of(W), torch.randn(len(W))
    for tokens, ways in KERNELS.items():
        for way in ways:
            x = torch.randn(tokens, W.shape[1]).to(dtype)
            y = multiply(weight, x, bias, way)
            assert y.dtype == dtype
            assert y.shape == (tokens, len(W))
            assert difference(y, x.double() @ W.double().T + bias.double()) < TOLERANCE[dtype], way


def one_of_each(dtype: torch.dtype, shape: tuple[int, int]) -> object:
    """A case of the fast suite where all shapes have one dtype, or all dtypes one shape; the others are slow."""
    slow = dtype != torch.bfloat16 and shape != (9, 300)
    return pytest.param(dtype, shape, id=f"{dtype}-{shape}", marks=[pytest.mark.nightly] if slow else [])


@pytest.mark.parametrize(("dtype", "shape"), [one_of_each(d, s) for d in FLOATS for s in ((5, 7), (9, 300), (6, 513))])
def test_every_kernel_agrees_with_float64(triton: None, shape: tuple[int, int], dtype: torch.dtype):
    check_product(pruned(*shape, 0.5, dtype), dtype)


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
def test_kernels_agree_on_dense_thin_and_empty_layers(triton: None, sparsity: float):
    check_product(pruned(7, 290, sparsity, torch.float16), torch.float16)


@pytest.mark.nightly
def test_kernels_agree_on_a_layer_of_several_programs(triton: None):
    check_product(pruned(66, 800, 0.7, torch.bfloat16), torch.bfloat16)


def test_plain_torch_agrees_with_float64(plain: None):
    for dtype in FLOATS:
        check_product(pruned(9, 300, 0.5, dtype), dtype)


def test_activations_and_values_may_differ_in_dtype(triton: None):
    W = pruned(5, 270, 0.5, torch.bfloat16)
    for dtype in FLOATS:
        x = torch.randn(1, 270).to(dtype)
        for way in ("matvec-4x4", "matmat-16x4", "expand"):
            assert difference(multiply(weight_of(W), x, None, way), x.double() @ W.double().T) < TOLERANCE[dtype], (
                dtype,
                way,
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_expanding_gives_back_every_byte(triton: None, dtype: torch.dtype):
    W = pruned(9, 300, 0.5, dtype)
    W[0, :3], W[8, 297:] = torch.tensor([-0.0, torch.inf, torch.nan]), torch.tensor([-torch.inf, torch.nan, 1.0])
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(gpu_ops.expand(weight_of(W), 300, dtype).cpu().view(integers), W.view(integers))


def test_an_infinite_weight_does_not_reach_its_neighbours(triton: None):
    W = pruned(6, 300, 0.5, torch.float32)
    W[1, 0] = W[3, 299] = torch.inf
    x = torch.ones(1, 300)
    for way in ("matvec-4x4", "matmat-16x4"):
        y = multiply(weight_of(W), x, None, way)[0]
        assert y.isinf().tolist() == [False, True, False, True, False, False], way


def test_values_after_the_last_one_are_not_read(triton: None):
    W, x = pruned(5, 270, 0.5, torch.float32), torch.randn(1, 270)
    weight = weight_of(W)
    weight.values[int((W != 0).sum()) :] = torch.nan
    for way in ("matvec-4x4", "matmat-16x4", "expand"):
        assert difference(multiply(weight, x, None, way), x.double() @ W.double().T) < 1e-6, way


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("kernels", [True, False])
def test_int8_values_are_scaled(request: pytest.FixtureRequest, group: int | None, kernels: bool):
    request.getfixturevalue("triton" if kernels else "plain")
    rows, columns = 6, 300
    integers = (torch.randint(-127, 128, (rows, columns)) * (torch.rand(rows, columns) < 0.5)).to(torch.int8)
    scales = torch.rand(rows) if group is None else torch.rand(rows, -(-columns // group))
    W = integers.double() * native.spread_scales(scales, columns).double()
    bitmask, values = native.pack(integers)
    starts = native.row_starts(bitmask, columns)
    layer = SparseLinear(bitmask, values, starts, columns, scales=scales).to(DEVICE)
    for tokens in (1, 3, 17):
        x = torch.randn(tokens, columns)
        assert difference(gpu.forward(layer, x.to(DEVICE)).cpu(), x.double() @ W.T) < 1e-5


def test_the_table_says_where_each_chunk_begins():
    W = pruned(5, 700, 0.6, torch.float32)
    bitmask, _ = native.pack(W)
    starts = native.row_starts(bitmask, 700)
    table = gpu_ops.chunk_table(bitmask, starts)
    keep = W != 0
    for row in range(5):
        for chunk in range(3):
            assert int(table[row, chunk]) == int(keep[:row].sum() + keep[row, : 256 * chunk].sum())
    with pytest.raises(BillhookError, match="too large for the GPU kernels"):
        gpu_ops.chunk_table(bitmask, torch.tensor([0] * 5 + [2**31]))


@pytest.mark.parametrize(
    ("tokens", "way"), [(0, "expand"), (1, "a"), (2, "b"), (4, "b"), (5, "c"), (16, "c"), (17, "expand")]
)
def test_the_kernel_depends_on_the_number_of_tokens(tokens: int, way: str):
    assert gpu_ops.way_for("a b c", tokens) == way


def test_a_layer_multiplies_any_input(triton: None):
    W, bias = pruned(6, 270, 0.5, torch.float32), torch.randn(6)
    layer = layer_of(W, bias)
    for x in (
        torch.randn(2, 3, 270),
        torch.randn(270),
        torch.randn(270, 4).T,
        torch.randn(0, 270),
        torch.randn(540)[::2],
    ):
        y = gpu.forward(layer, x.to(DEVICE)).cpu()
        assert y.shape == (*x.shape[:-1], 6)
        assert difference(y, x.double() @ W.double().T + bias.double()) < 1e-6


def test_new_weights_are_seen(triton: None):
    layer, other = layer_of(pruned(6, 270, 0.5, torch.float32)), pruned(6, 270, 0.7, torch.float32)
    x = torch.randn(1, 270)
    gpu.forward(layer, x.to(DEVICE))
    layer.load_state_dict(SparseLinear.from_dense(other).state_dict())
    assert difference(gpu.forward(layer, x.to(DEVICE)).cpu(), x.double() @ other.double().T) < 1e-6


def test_the_fastest_kernel_is_measured_once_and_cached(triton: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path))
    weight = weight_of(pruned(8, 128, 0.5, torch.float32))
    times = iter(
        [3, 1, 2, 4, 5, 1, 2, 9, 9, 9, 1]
    )  # four ways and expanding for one token, two ways and expanding for 4 and for 16

    def timed(call: object) -> float:
        call()  # type: ignore[operator]
        return next(times)

    chosen = gpu.choose(weight, 128, torch.float32, timed)
    assert chosen == "matvec-4x4 matmat-64x8 expand"
    assert gpu.choose(weight, 128, torch.float32, timed) == chosen
    assert next(times, None) is None


def test_the_chosen_kernels_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path))
    chosen = gpu.ways(layer_of(pruned(8, 128, 0.5, torch.float32)), torch.float32)
    assert list(chosen) == [1, 4, 16, 512]
    assert chosen[512] == "expand"


@pytest.mark.nightly
def test_the_operator_compiles():
    W = pruned(6, 270, 0.5, torch.float32)
    layer, x = layer_of(W), torch.randn(1, 270, device=DEVICE)
    expected = gpu.forward(layer, x)
    compiled = torch.compile(lambda x: gpu.forward(layer, x), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    weight = weight_of(W)
    arguments = x, weight.bitmask, weight.values, weight.table, None, None
    ways = {"group": 0, "ways": "expand expand expand"}
    torch.library.opcheck(gpu_ops.gpu_linear, arguments, ways, test_utils=("test_schema", "test_faketensor"))
