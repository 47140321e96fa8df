"""Shares of the divergence are its slopes along each layer's change, and add up to it."""

import statistics
from collections.abc import Iterator

import pytest
import tiny
import torch

from billhook import allocate, measure
from billhook.architectures.layers import find_layers
from billhook.engine.method import Method
from billhook.trials.trials import TrialRunner


def text(windows: int = 16) -> torch.Tensor:
    return torch.randint(0, 258, (windows, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def runner() -> Iterator[TrialRunner]:
    """A model pruned to half by Wanda."""
    model, method = tiny.llama(), Method("wanda", {})
    with TrialRunner(
        model, find_layers(model), [{"input_ids": text(8)}], {"input_ids": text(16)[8:]}, method
    ) as runner:
        runner.prune(allocate(measure(model, []), 0.5))
        yield runner


def mean_kl(runner: TrialRunner) -> float:
    return statistics.fmean(runner.losses(0, 8).kl)


def test_shares_are_the_slopes_of_the_divergence_and_add_up_to_it(runner: TrialRunner) -> None:
    """Each against a central difference along the layer's change; near the dense model the divergence is quadratic:
    Euler's sum."""
    with torch.no_grad():
        for layer in runner.layers:  # 5 % of the way from the dense weights to the pruned ones
            layer.weight.lerp_(runner._dense[layer.name], 0.95)
    shares = runner.attribute()
    assert sum(shares.values()) == pytest.approx(mean_kl(runner), rel=0.05)
    assert not any(p.requires_grad and p.grad is not None for p in runner.model.parameters())
    largest = sorted(runner.layers, key=lambda layer: -shares[layer.name])[:4]
    for layer in largest:
        here, found = layer.weight.clone(), []
        for step in (0.05, -0.05):
            with torch.no_grad():
                layer.weight.copy_(here + step * (here - runner._dense[layer.name]))
            found.append(mean_kl(runner))
            layer.weight.copy_(here)
        assert shares[layer.name] == pytest.approx((found[0] - found[1]) / 0.1 / 2, rel=0.05)


def test_shares_are_the_same_when_activations_are_recomputed_and_none_is_negligible(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = runner.attribute()
    monkeypatch.setattr("billhook.trials.attribution._BYTES", 0)
    assert first == pytest.approx(runner.attribute(), rel=1e-4)
    assert min(first.values()) >= 0.02 * statistics.fmean(first.values())


def test_the_logits_of_a_batch_are_bounded(runner: TrialRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, whole = list[int](), runner.attribute()
    runner.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("billhook.evaluation.batching.LOGIT_BYTES", 3 * 24 * 258 * 4)
    assert whole == pytest.approx(runner.attribute(), rel=1e-3)
    assert sizes == [3, 3, 2]


def test_experts_have_shares_of_their_own() -> None:
    """Experts are slices of one parameter: each gets the product of its own slice."""
    model = tiny.mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares = measure(model, ["loss_share:wanda"], batches=text(8)).column("loss_share:wanda")
    assert len(shares) == len(find_layers(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(set(shares)) > len(shares) / 2
