"""A sparse layer behaves as a torch module: operator, compilation, adoption of a linear layer, state dictionaries."""

from collections.abc import Iterator

import pytest
import torch
from sparse_layers import assert_product, layer, random_weight

from billhook.errors import BillhookError
from billhook.runtime import autotune, library, native, ops
from billhook.runtime.linear import DenseLinear, SparseLinear, adopt_


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("BILLHOOK_CACHE", "0")
    autotune.clear_choices()
    yield
    autotune.clear_choices()


@pytest.mark.gate
def test_the_operator_passes_the_checks_of_torch():
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


def test_a_layer_compiles_without_a_graph_break():
    model = torch.nn.Sequential(
        layer(random_weight((96, 130), 0.4, torch.bfloat16)), torch.nn.ReLU(), torch.nn.Linear(96, 40).bfloat16()
    )
    adopt_(model[2])
    x = torch.randn(3, 130).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), model(x))


def test_the_operator_has_no_derivative():
    packed = layer(random_weight((8, 70), 0.4, torch.float32))
    y = packed(torch.randn(2, 70, requires_grad=True))
    with pytest.raises(BillhookError, match="inference"):
        y.sum().backward()


def test_a_replaced_layer_is_still_an_instance_of_linear():
    linear = torch.nn.Linear(300, 50).bfloat16()
    x = torch.randn(2, 300).bfloat16()
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
    expected = linear.weight.detach().float().sum(0).expand(2, -1)
    torch.testing.assert_close(x.grad.float(), expected, rtol=0.02, atol=0.02)


def test_a_state_dict_with_other_counts_is_loaded():
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


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:]])


WRONG = {  # changed arguments of a layer of 9 rows and 130 columns, and what the message says
    "short bitmask": ("bitmask", lambda t: t[:, :16], r"bitmask of .* 130 columns must be torch.uint8 \[9, 24\]"),
    "flat bitmask": ("bitmask", lambda t: t.flatten(), r"bitmask .* must be torch.uint8"),
    "bitmask of bool": ("bitmask", lambda t: t.bool(), r"bitmask .* found torch.bool"),
    "short values": ("values", lambda t: t[:-1], "values with padding"),
    "positions of int32": ("starts", lambda t: t.int(), r"positions of rows .* must be torch.int64 \[10\]"),
    "more positions": ("starts", longer, r"positions of rows .* must be torch.int64 \[10\], found torch.int64 \[11\]"),
    "no position": ("starts", lambda t: t[:0], r"positions of rows .* must be torch.int64"),
    "positions that fall": ("starts", lambda t: t - (torch.arange(10) == 4) * 99, "must begin with 0 and never fall"),
    "positions that jump": ("starts", lambda t: t + (torch.arange(10) == 4) * 999, "must begin with 0 and never fall"),
    "positions from 1": ("starts", lambda t: t.clamp(min=1), "must begin with 0"),
    "more scales": ("scales", lambda t: torch.cat([t, t], 1), "6 scales per row do not fit 130 columns"),
    "scales of scales": ("scales", lambda t: t[..., None], r"Scales must be float32 \[9\] or \[9, groups\]"),
    "fewer scales": ("scales", lambda t: t[1:], r"found torch.float32 \[8, 3\]"),
}


@pytest.mark.parametrize("kernels", [*library.paths()[:1], "torch"])
@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_kernel_would_read_outside_of_its_tensors_is_refused(wrong: str, kernels: str):
    packed = layer(random_weight((9, 130), 0.3, torch.int8), torch.rand(9, 3))
    name, change, message = WRONG[wrong]
    given = {"bitmask": packed.bitmask, "values": packed.values, "starts": packed.row_starts, "scales": packed.scales}
    given[name] = change(given[name])
    bitmask, values, starts, scales = given.values()
    x = torch.randn(2, 130)
    with library.forced(kernels):
        with pytest.raises(BillhookError, match=message):
            SparseLinear(bitmask, values, starts, 130, scales=scales)
        with pytest.raises(BillhookError, match=message):
            ops.sparse_linear(x, bitmask, values, starts, scales, None)
        with pytest.raises(BillhookError, match=message):
            native.expand(bitmask, values, starts, 130, scales=scales)
        setattr(packed, "row_starts" if name == "starts" else name, given[name])
        packed._weight = None
        with pytest.raises(BillhookError, match=message):
            packed(x)


@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.randn(2, 130), torch.randn(8)),
        (torch.randn(2, 130), torch.randn(1)),
        (torch.randn(2, 130), torch.randn(9).half()),
        (torch.randn(2, 131), None),
        (torch.randn(1, 65), None),
    ],
    ids=["short bias", "one bias", "bias of float16", "wide inputs", "narrow inputs"],
)
def test_inputs_and_biases_of_another_shape_are_refused(x: torch.Tensor, bias: torch.Tensor | None):
    packed = layer(random_weight((9, 130), 0.3, torch.float32)).packed()
    with pytest.raises(BillhookError, match="A weight of 9 rows and 130 columns was given inputs"):
        packed.multiply(x, bias)


def test_a_bias_with_gaps_is_added_as_its_values_are():
    W, x, bias = random_weight((9, 130), 0.3, torch.float32), torch.randn(2, 130), torch.randn(18)[::2]
    assert_product(layer(W, bias=bias)(x), x, W.double(), bias)


def test_tensors_with_gaps_or_of_another_device_do_not_reach_the_kernels():
    packed = layer(random_weight((9, 130), 0.3, torch.float32))
    gaps = packed.bitmask.t().contiguous().t()
    for bitmask in (gaps, packed.bitmask.to("meta")):
        with pytest.raises(BillhookError, match="contiguous tensors on the CPU"):
            native.Weight(9, 130, packed.values, bitmask, packed.row_starts, None)


@pytest.mark.parametrize("before", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("after", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_converted_layer_is_still_a_packed_weight_with_its_padding(before: torch.dtype, after: torch.dtype):
    """The kernels read 64 bytes behind the last value, and float32 scales."""
    W = random_weight((9, 130), 0.4, before)
    scales = torch.rand(9, 3) if before == torch.int8 else None
    packed = layer(W, scales, torch.randn(9))
    exact = packed.dense()
    converted = packed.to(after)
    native.check(converted.bitmask, converted.values, converted.row_starts, (9, 130), converted.scales)
    layer(W, scales, torch.randn(9)).load_state_dict(converted.state_dict())
    kept = scales is not None or after == torch.float64  # which the kernels do not multiply
    assert converted.values.dtype == (before if kept else after)
    assert torch.equal(converted.dense(), exact if kept else exact.to(after))
    x = torch.randn(2, 130).to(torch.float32 if after == torch.float64 else after)
    assert_product(converted(x), x, converted.dense().double(), converted.bias.to(x.dtype), rounded=True)
    everything = layer(W, scales).type(after)  # which converts integers, too
    native.check(everything.bitmask, everything.values, everything.row_starts, (9, 130), everything.scales)


def test_replaced_buffers_without_padding_or_with_other_scales_are_refused():
    one, two = (
        layer(random_weight((9, 130), 0.4, torch.float32)),
        layer(random_weight((9, 130), 0.4, torch.int8), torch.ones(9)),
    )
    one.values = one.values.half()
    two.scales = two.scales.half()
    for packed, words in ((one, "values with padding"), (two, "Scales must be float32")):
        with pytest.raises(BillhookError, match=words):
            packed(torch.randn(2, 130))
        arguments = (packed.bitmask, packed.values, packed.row_starts, packed.scales, None)
        with pytest.raises(BillhookError, match=words):
            ops.sparse_linear(torch.randn(2, 130), *arguments)
