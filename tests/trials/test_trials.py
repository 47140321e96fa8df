"""Trials score a model pruned in full, restore its weights, and share what is computed once; the split is disjoint."""

from typing import Any

import pytest
import torch
from tiny import llama, mixtral

from billhook import allocate, find_layers, measure, search
from billhook.engine.gradients import compute_gradients
from billhook.engine.method import Method
from billhook.engine.restore import restored
from billhook.tasks.base import Samples
from billhook.text.windows import digest
from billhook.trials.heldout import split_samples
from billhook.trials.trials import TrialRunner


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(258, (12, 32), generator=torch.Generator().manual_seed(1))


def split_of(tokens: torch.Tensor, seed: int = 0) -> Any:
    return split_samples(llama(), Samples({"input_ids": tokens}, "a test", digest(tokens), "given"), 4, seed)


def find(model: Any, tokens: torch.Tensor, **changes: Any) -> Any:
    return search(
        model, **({"sparsity": 0.5, "criterion": "wanda", "allocator": "atp", "calibration": tokens} | changes)
    )


def test_losses_of_the_dense_model_and_of_a_pruned_one(tokens: torch.Tensor):
    model, split = llama(), split_of(tokens)
    with TrialRunner(model, find_layers(model), split.batches, split.heldout, Method("wanda", {})) as runner:
        losses = runner.losses(0, 6)
        assert max(map(abs, losses.kl)) < 1e-5
        logits = model(split.heldout["input_ids"][:1]).logits[0, :-1].detach()
        expected = torch.nn.functional.cross_entropy(logits, split.heldout["input_ids"][0, 1:])
        assert losses.nll[0] == pytest.approx(float(expected), abs=1e-5)
        runner.prune(allocate(measure(model, []), 0.5))
        assert min(runner.losses(0, 6).kl) > 0
        assert runner.losses(2, 4).kl == pytest.approx(runner.losses(0, 6).kl[2:4], rel=1e-4)


def test_every_trial_starts_from_the_dense_weights(tokens: torch.Tensor):
    model, split, table = llama(), split_of(tokens), measure(llama(), [])
    once = {}
    with TrialRunner(model, find_layers(model), split.batches, split.heldout, Method("wanda", {})) as runner:
        for sparsity in (0.3, 0.8, 0.3):
            runner.prune(allocate(table, sparsity))
            weights = [layer.weight.clone() for layer in find_layers(model)]
            assert all(map(torch.equal, once.setdefault(sparsity, weights), weights))


def test_weights_are_restored_whatever_happens():
    model = mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupted() -> None:
        with restored(find_layers(model)):
            for layer in find_layers(model):
                layer.weight.zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_gradients_are_computed_once_for_all_trials(tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(
        "billhook.trials.trials.compute_gradients",
        lambda *a, **k: made.append(compute_gradients(*a, **k)) or made[-1],
    )
    monkeypatch.setattr("billhook.steps.gradients.compute_gradients", None)
    model = llama()
    assert len(find(model, tokens, criterion="gblm", budget=3).trials) == 4
    assert len(made) == 1
    assert not made[0].path.exists()
    assert torch.equal(find_layers(model)[0].weight, find_layers(llama())[0].weight)


def test_split_is_disjoint_and_recorded(tokens: torch.Tensor):
    split = split_of(torch.cat([tokens, tokens[:5]]))
    calibration, heldout = torch.cat([batch["input_ids"] for batch in split.batches]), split.heldout["input_ids"]
    assert not {tuple(row) for row in calibration.tolist()} & {tuple(row) for row in heldout.tolist()}
    assert len(calibration) == len(heldout) == 6
    assert split.facts["heldout"] == {"windows": 6, "digest": digest(heldout)}
    assert split.facts["calibration"]["digest"] == digest(calibration)
    assert split_of(tokens, seed=1).facts["heldout"] != split.facts["heldout"]
