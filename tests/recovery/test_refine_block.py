"""Tuning one block: what is kept, and when it ends."""

import math

import pytest
import torch

from billhook.engine.replay import Call
from billhook.engine.walk import Following
from billhook.recovery import blockwise
from billhook.recovery.block_data import HELD_OUT, Data
from billhook.recovery.blockwise import PATIENCE, Refine, refine_block_
from billhook.recovery.kept_adam import Kept


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

    mean_loss = blockwise._mean_loss
    monkeypatch.setattr(torch.optim, "Adam", Recording)
    monkeypatch.setattr(blockwise, "_mean_loss", recorded)
    generator = torch.Generator().manual_seed(0)
    x, weight, noise = (torch.randn(*shape, generator=generator) for shape in ((16, 1, 16), (16, 16), (16, 1, 16)))
    following = Following(Linear(torch.eye(16)), [Call((), {})], lambda h: h)
    target = x @ (weight + 0.5 * torch.randn(16, 16, generator=generator)).T + noise  # which is learnt by heart
    data = Data([x], [target], following.calls, [[*following.calls, *following.calls]], following)
    for rate in (0.05, 30.0):  # the second makes everything worse
        rates, losses, block = list[float](), list[float](), Linear(weight.clone())
        tuned = [Kept("weight", block.weight, weight.dtype, torch.ones_like(weight, dtype=torch.bool))]
        result = refine_block_(block, data, tuned, Refine(rate=rate))
        steps = 20 * len(rates) // result.epochs
        first = rate * float(weight.square().mean().sqrt())
        cosine = [first * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(len(rates))]
        assert rates == pytest.approx(cosine)
        tried = losses[1:-1]  # before the first epoch, and after each
        assert result.after == pytest.approx(min(tried))
        assert min(tried) < tried[-1]
        assert result.epochs == tried.index(min(tried)) + PATIENCE
        assert (result.after < result.before) == (rate < 1)
