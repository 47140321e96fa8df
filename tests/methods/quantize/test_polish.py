"""Coordinate descent on codes and the stored numbers of scales."""

import pytest
import torch
from quantized_layers import layer

from billhook.methods.quantize import QUANTIZERS, gptq
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.polish import polish


def loss(W, H, made):
    D = (W - made.decode(torch.float32)).double()
    return ((D @ H.double()) * D).sum(1)


def rounded(name):
    """W [out, in], the Gram, and W rounded to a type."""
    W, stats, _ = layer(6, columns=512, tokens=2048)
    return W, stats.gram, QUANTIZERS.get("round")(W, stats, grid_of(name))


@pytest.mark.parametrize("name", ["int3/64", "q4_0", "q4_1", "q2_k", "q3_k", "iq2_xs", "iq4_xs"])
def test_no_row_has_a_higher_loss_and_scales_are_still_what_the_file_holds(name):
    W, H, start = rounded(name)
    made = polish(W, H, start, 1)
    before, after = loss(W, H, start), loss(W, H, made)
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.7 * before.sum()
    for part, value in made.scales.parts.items():
        assert value.dtype == start.scales.parts[part].dtype
    assert torch.equal(made.scales.scale == 0, start.scales.scale == 0)


@pytest.mark.parametrize(
    "name", ["q2_k", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("q3_k", "int3/64", "q4_1"))]
)
def test_at_the_end_no_number_of_a_scale_can_be_moved_for_less_loss(name):
    W, H, start = rounded(name)
    end = polish(W, H, start, 30)
    best, grid = loss(W, H, end), end.grid
    for part in {term.part for term in grid.terms}:
        numbers = end.scales.parts[part]
        moves = (-1, 1) if numbers.dtype == torch.int8 else (0.97, 1.03)
        for move in moves:
            for group in range(0, numbers.shape[1], 3):
                moved = numbers.clone()
                moved[:, group] = moved[:, group] + move if numbers.dtype == torch.int8 else moved[:, group] * move
                if numbers.dtype == torch.int8:
                    moved.clamp_(grid.multipliers.low, grid.multipliers.high)
                tried = type(end)(grid, end.codes, grid.decoded({**end.scales.parts, part: moved}))
                dead = end.scales.scale[:, group] == 0
                assert ((loss(W, H, tried) >= best * (1 - 1e-4)) | dead).all()


def test_codes_and_scales_that_are_as_good_as_they_can_be_stay():
    _, H, start = rounded("int4/64")
    exact = start.decode(torch.float32)
    made = polish(exact, H, start, 3)
    assert torch.equal(made.codes, start.codes)
    assert torch.equal(made.decode(torch.float32), exact)


@pytest.mark.parametrize("name", ["int3/64", "q4_k", "iq3_s"])
def test_rows_in_parts_are_what_they_are_together(name, monkeypatch):
    W, stats, _ = layer(6, columns=256, tokens=1024)
    grid = grid_of(name)
    together = gptq.gptq(W, stats, grid, sweeps=1)
    monkeypatch.setattr(gptq, "ROWS", 7)
    apart = gptq.gptq(W, stats, grid, sweeps=1)
    assert float((together.codes == apart.codes).float().mean()) > 0.99
    torch.testing.assert_close(loss(W, stats.gram, apart).sum(), loss(W, stats.gram, together).sum(), rtol=0.01, atol=0)
