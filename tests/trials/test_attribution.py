"""Shares of the divergence are its slopes along each layer's change, and add up to it."""

import statistics
from collections.abc import Iterator
from functools import partial

import pytest
import tiny
import torch
from families import build

from billhook import allocate, measure
from billhook.architectures.layers import find_layers
from billhook.engine.method import Method
from billhook.trials.trials import TrialRunner


def text(windows: int = 16) -> torch.Tensor:
    return torch.randint(0, 258, (windows, 24), generator=torch.Generator().manual_seed(0))


EVERY_EXPERT = partial(tiny.mixtral, num_experts_per_tok=4)  # a choice of experts would be a step of the divergence


@pytest.fixture
def runner(request: pytest.FixtureRequest) -> Iterator[TrialRunner]:
    """A model (a llama unless the test names another) pruned to half by Wanda."""
    model, method = getattr(request, "param", tiny.llama)(), Method("wanda", {})
    ids = text(16) % model.config.vocab_size
    with TrialRunner(model, find_layers(model), [{"input_ids": ids[:8]}], {"input_ids": ids[8:]}, method) as runner:
        runner.prune(allocate(measure(model, []), 0.5))
        yield runner


def mean_kl(runner: TrialRunner) -> float:
    return statistics.fmean(runner.losses(0, 8).kl)


@pytest.mark.parametrize("runner", [tiny.llama, EVERY_EXPERT, partial(build, "gpt2")], indirect=True)
def test_shares_are_the_slopes_of_the_divergence_and_add_up_to_it(runner: TrialRunner) -> None:
    """Each against a central difference along the layer's change, of slices and of transposed weights too; near the
    dense model the divergence is quadratic: Euler's sum."""
    with torch.no_grad():
        for layer in runner.layers:  # 5 % of the way from the dense weights to the pruned ones
            layer.weight.lerp_(runner._dense[layer.name], 0.95)
    shares = runner.attribute()
    assert sum(shares.values()) == pytest.approx(mean_kl(runner), rel=0.05)
    assert not any(p.requires_grad and p.grad is not None for p in runner.model.parameters())
    largest = {layer.kind: layer for layer in sorted(runner.layers, key=lambda layer: shares[layer.name])}
    for layer in largest.values():
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


@pytest.mark.parametrize(("windows", "last"), [(7, 3), (40, 16)])
def test_the_metric_scores_the_last_windows_after_pruning_with_the_others(windows: int, last: int) -> None:
    """To 60 %; the weights are as they were afterwards."""
    model, ids = tiny.mixtral(), text(windows)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares = measure(model, ["loss_share:wanda"], batches=ids).column("loss_share:wanda")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    given, heldout, method = [{"input_ids": ids[:-last]}], {"input_ids": ids[-last:]}, Method("wanda", {})
    with TrialRunner(model, find_layers(model), given, heldout, method) as runner:
        runner.prune(allocate(measure(model, []), 0.6))
        assert shares == pytest.approx(list(runner.attribute().values()), rel=1e-4)
