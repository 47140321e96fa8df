"""What every quantizer promises, on every scalar grid."""

import pytest
import torch
from quantized_layers import error, layer

from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.grids import grid_of
from billhook.methods.statistics import LayerStats

TYPES = ["int2/16", "int3/32", "int4/64", "int5/64", "int8/64"]


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("quantizer", QUANTIZERS.names())
def test_codes_are_in_range_and_decode_to_scale_times_code(quantizer, type):
    W, stats, _ = layer()
    grid = grid_of(type, torch.bfloat16)
    made = QUANTIZERS.get(quantizer)(W.clone(), stats, grid)
    half = 1 << (int(type[3]) - 1)
    assert made.codes.dtype == torch.int8
    assert -half <= int(made.codes.min()) <= int(made.codes.max()) <= half - 1
    expected = torch.empty_like(W)
    for row in range(W.shape[0]):
        for column in range(W.shape[1]):
            scale = made.scales.scale[row, column // grid.group]
            assert scale == scale.bfloat16().float()
            expected[row, column] = scale * int(made.codes[row, column])
    assert torch.equal(made.decode(torch.float32), expected)
    assert made.check(made.decode(torch.bfloat16)) == []


@pytest.mark.parametrize("quantizer", QUANTIZERS.names())
def test_the_error_falls_with_every_bit(quantizer):
    W, stats, X = layer(1)
    errors = []
    for bits in range(2, 9):
        made = QUANTIZERS.get(quantizer)(W, stats, grid_of(f"int{bits}/64"))
        errors.append(error(W, made.decode(torch.float32), X))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_gptq_has_less_output_error_than_rounding_and_sweeps_lower_it_further():
    W, stats, X = layer(2)
    grid = grid_of("int3/32")
    nearest = QUANTIZERS.get("round")(W, stats, grid)
    plain, swept = (QUANTIZERS.get("gptq")(W, stats, grid, dense_target=0.0, sweeps=n) for n in (0, 4))
    errors = [error(W, made.decode(torch.float32), X) for made in (nearest, plain, swept)]
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.8 * errors[1]


def test_a_row_of_zeros_and_inputs_that_are_always_zero_stay_finite():
    W, stats, X = layer(3)
    W[5] = 0
    X[:, 3] = 0
    gram = X.T @ X
    stats = LayerStats(len(X), 1, input_norm=gram.diagonal().sqrt(), gram=gram)
    for quantizer in QUANTIZERS.names():
        made = QUANTIZERS.get(quantizer)(W, stats, grid_of("int4/64")).decode(torch.float32)
        assert made.isfinite().all()
        assert not made[5].any()


def test_a_group_too_small_for_a_16_bit_scale_becomes_zero():
    W, stats, _ = layer(3)
    W[:, 64:] *= 1e-30
    made = QUANTIZERS.get("round")(W, stats, grid_of("int4/64")).decode(torch.float32)
    assert not made[:, 64:].any()
    assert made[:, :64].any()
