"""Tuning one block: what is kept, and when it ends."""

import math

import pytest
import torch

from billhook.engine.replay import Call
from billhook.engine.walk import Following
from billhook.recovery import blockwise
from billhook.recovery.block_data import HELD_OUT, Data
from billhook.recovery.blockwise import PATIENCE, Refine, refine_block_
from billhook.recovery.trained import Kept


class Linear(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_that_only_rounding_makes_worse_gets_its_weights_back(dtype: torch.dtype) -> None:
    """The target is so near that the changes are half a last place of bfloat16; in float32 all of them help."""
    improved, held = [], slice(HELD_OUT // 2, None, HELD_OUT)
    following = Following(Linear(torch.eye(16, dtype=dtype)), [Call((), {})], lambda h: h)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        x, weight = (
            torch.randn(*shape, generator=generator).bfloat16().to(dtype) for shape in ((16, 12, 16), (16, 16))
        )
        near = weight.float() + 6e-4 * torch.randn(16, 16, generator=generator)
        target, block = (x.float() @ near.T).to(dtype), Linear(weight.clone())
        data = Data([x], [target], following.calls, [[*following.calls, *following.calls]], following)
        tuned = [Kept("weight", block.weight, dtype, torch.ones_like(weight, dtype=torch.bool))]
        result = refine_block_(block, data, tuned, Refine(epochs=2, rate=2e-4))
        whole = target[held].float().square().sum((1, 2))
        losses = [
            float(((x @ W.T).float() - target.float())[held].square().sum((1, 2)).div(whole).mean())
            for W in (weight, block.weight)
        ]
        assert (result.before, result.after) == pytest.approx(tuple(losses), rel=1e-3)
        improved.append(losses[1] < losses[0])
        assert improved[-1] or torch.equal(block.weight, weight)
    assert all(improved) if dtype == torch.float32 else 0 < sum(improved) < 12


def learnt_by_heart() -> tuple[torch.Tensor, Data]:
    """A weight, and a target that is learnt by heart."""
    generator = torch.Generator().manual_seed(0)
    x, weight, noise = (torch.randn(*shape, generator=generator) for shape in ((16, 1, 16), (16, 16), (16, 1, 16)))
    following = Following(Linear(torch.eye(16)), [Call((), {})], lambda h: h)
    target = x @ (weight + 0.5 * torch.randn(16, 16, generator=generator)).T + noise
    return weight, Data([x], [target], following.calls, [[*following.calls, *following.calls]], following)


@torch.no_grad()
def test_the_best_epoch_is_kept_and_four_without_gain_are_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate that falls as a cosine."""

    class Recording(torch.optim.Adam):
        def step(self) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step()

    def recorded(*args) -> float:
        losses.append(mean_loss(*args))
        return losses[-1]

    mean_loss, (rates, losses) = blockwise._mean_loss, (list[float](), list[float]())
    monkeypatch.setattr(torch.optim, "Adam", Recording)
    monkeypatch.setattr(blockwise, "_mean_loss", recorded)
    weight, data = learnt_by_heart()
    block = Linear(weight.clone())
    tuned = [Kept("weight", block.weight, weight.dtype, torch.ones_like(weight, dtype=torch.bool))]
    result = refine_block_(block, data, tuned, Refine(rate=0.05))
    steps = 20 * len(rates) // result.epochs
    first = 0.05 * float(weight.square().mean().sqrt())
    cosine = [first * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(len(rates))]
    assert rates == pytest.approx(cosine)
    tried = losses[1:-1]  # before the first epoch, and after each
    assert result.after == pytest.approx(min(tried))
    assert min(tried) < tried[-1]
    assert result.epochs == tried.index(min(tried)) + PATIENCE
    assert result.after < result.before


@torch.no_grad()
def test_smaller_steps_are_tried_where_large_ones_make_everything_worse() -> None:
    """From the weights as they were, which come back where no step helps."""
    weight, data = learnt_by_heart()
    for rate, failed, better in ((0.05, 0, True), (0.6, 1, True), (1.5, 2, True), (30.0, 3, False)):
        block = Linear(weight.clone())
        tuned = [Kept("weight", block.weight, weight.dtype, torch.ones_like(weight, dtype=torch.bool))]
        result = refine_block_(block, data, tuned, Refine(rate=rate))
        assert (result.after < result.before) == better
        assert torch.equal(block.weight, weight) != better
        if better:
            alone = Linear(weight.clone())
            tuned = [Kept("weight", alone.weight, weight.dtype, torch.ones_like(weight, dtype=torch.bool))]
            last = refine_block_(alone, data, tuned, Refine(rate=rate * 0.2**failed))
            assert result.epochs == failed * PATIENCE + last.epochs
            torch.testing.assert_close(block.weight, alone.weight)
        else:
            assert result.epochs == failed * PATIENCE
