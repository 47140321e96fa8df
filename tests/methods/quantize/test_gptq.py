"""GPTQ against plain loops."""

import torch
from live_memory import LiveMemory
from quantized_layers import layer

from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.gptq import gptq
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.polish import polish
from billhook.methods.statistics import LayerStats


def test_codes_are_those_of_the_algorithm_in_plain_loops():
    """Column by column with the inverse of the remaining Hessian recomputed, as in Optimal Brain Quantization."""
    W, stats, _ = layer(4, out=5, columns=32)
    grid = grid_of("int3/16")
    made = gptq(W, stats, grid, damping=0.01, dense_target=0.0, sweeps=0, shrinkage=0.0)
    H = stats.gram.double() + 0.01 * stats.gram.diagonal().double().mean() * torch.eye(32)
    w, scale = W.double().clone(), made.scales.scale
    for column in range(32):
        inverse = torch.linalg.inv(H[column:, column:])
        code = (w[:, column] / scale[:, column // 16]).round().clamp(-4, 3)
        assert torch.equal(made.codes[:, column].double(), code)
        error = (w[:, column] - code * scale[:, column // 16]) / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0][None, :]


def test_with_few_tokens_for_the_inputs_errors_on_other_text_are_not_larger_than_those_of_rounding():
    """The Gram matrix of a short text has noise; as published, errors are passed on along it."""
    generator = torch.Generator().manual_seed(0)
    mix, W = torch.randn(128, 128, generator=generator), torch.randn(32, 128, generator=generator)
    few, other = (torch.randn(n, 128, generator=generator) @ (torch.eye(128) + 0.05 * mix) for n in (96, 4096))
    stats = LayerStats(len(few), 1, input_norm=few.norm(dim=0), gram=few.T @ few)
    grid = grid_of("int3/32")

    def loss(made):
        return float(((made.decode(torch.float32) - W) @ other.T).square().sum())

    rounded = loss(QUANTIZERS.get("round")(W, stats, grid, weighted=True))
    published, ours = (
        loss(gptq(W, stats, grid, dense_target=0.0, sweeps=n, shrinkage=s)) for n, s in ((0, 0.0), (4, 1.0))
    )
    assert published > rounded
    assert ours < rounded


def test_polishing_never_raises_the_loss_of_a_row_and_ends_where_no_single_code_can_be_improved():
    W, stats, _ = layer(5, out=12, columns=64)
    grid = grid_of("int3/32")
    H = stats.gram + 0.01 * stats.gram.diagonal().mean() * torch.eye(64)
    start = gptq(W, stats, grid, dense_target=0.0, sweeps=0, shrinkage=0.0)

    def losses(made):
        D = made.decode(torch.float32) - W
        return ((D @ H) * D).sum(1)

    before = losses(start)
    end = polish(W, H, start, 50)
    assert (losses(end) <= before * (1 + 1e-5)).all()
    V, scale = end.decode(torch.float32), end.scales.scale.repeat_interleave(32, dim=1)
    best = losses(end)
    for column in range(0, 64, 7):
        for step in (-1, 1):
            code = (end.codes[:, column] + step).clamp(-4, 3)
            changed = V.clone()
            changed[:, column] = code * scale[:, column]
            D = changed - W
            assert (((D @ H) * D).sum(1) >= best * (1 - 1e-5)).all()


def test_memory_is_that_of_one_more_matrix_of_the_size_of_the_gram_matrix():
    """The factor is inverted in place, with two quarters of it beside it, and is gone before codes are polished."""
    columns, generator = 1024, torch.Generator().manual_seed(0)
    X, W = (torch.randn(rows, columns, generator=generator) for rows in (2048, 16))
    stats = LayerStats(2048, 1, gram=X.T @ X, stream_drift=torch.randn(16, columns, generator=generator))
    with LiveMemory([W, stats.gram, stats.stream_drift]) as memory:
        gptq(W, stats, grid_of("int4/64"))
    assert memory.peak < 1.7 * stats.gram.nbytes
