"""Integers of scales and minima, moved for the layer's output."""

import pytest
import torch
from quantized_layers import layer

from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.grid import dequantize
from billhook.methods.quantize.rescale import rescale


def rounded(name):
    """W [out, in], the Gram, and W rounded to a type."""
    W, stats, _ = layer(6, columns=512, tokens=2048)
    made = QUANTIZERS.get("round")(W, stats, GGML[name])
    return W, stats.gram, made


def loss(W, H, codes, scales):
    D = (W - dequantize(codes, scales)).double()
    return ((D @ H.double()) * D).sum(1)


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "iq2_xs", "iq4_xs"])
def test_no_row_has_a_higher_loss_and_scales_are_still_what_the_file_holds(name):
    W, H, made = rounded(name)
    scales = rescale(W, H, made.codes.float(), made.scales, made.grid)
    before, after = (loss(W, H, made.codes, s) for s in (made.scales, scales))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.97 * before.sum()
    assert torch.equal(made.grid.decoded(scales.parts).scale, scales.scale)
    assert torch.equal(scales.scale == 0, made.scales.scale == 0)


def test_the_last_integer_is_the_best_of_all_when_the_others_are_fixed():
    W, H, made = rounded("q3_k")
    scales = rescale(W, H, made.codes.float(), made.scales, made.grid)
    found, least = loss(W, H, made.codes, scales), torch.full((len(W),), torch.inf, dtype=torch.double)
    for integer in [*range(-32, 0), *range(1, 32)]:
        parts = dict(scales.parts, multipliers=scales.parts["multipliers"].clone())
        parts["multipliers"][:, -1] = integer
        least = torch.minimum(least, loss(W, H, made.codes, made.grid.decoded(parts)))
    assert torch.allclose(found, least, rtol=1e-4)
