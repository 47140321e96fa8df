"""Results do not depend on how calibration samples are batched."""

import pytest
import torch
from families import VOCABULARY, build

import billhook
from billhook.architectures.layers import find_layers
from billhook.engine.walk import walk

pytestmark = pytest.mark.gate

MODELS = ["llama", "mixtral", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("qwen3_moe", "gpt_oss"))]


def windows() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("statistics", [("input_norm",), ("input_norm", "gram")])
def test_input_norms_are_over_all_sequences(family: str, statistics: tuple[str, ...]):
    found = {}
    for size in (1, 2, 8):
        for block in walk(build(family), list(windows().split(size)), statistics, read_only=True):
            for name, stats in block.stats.items():
                assert stats.sequences == 8
                found.setdefault(name, []).append(stats.input_norm)
    for norms in found.values():
        for other in norms[1:]:
            torch.testing.assert_close(other, norms[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize(
    "allocator, criterion",
    [
        ("owl", "wanda"),
        *(pytest.param(*x, marks=pytest.mark.nightly) for x in [("dlp", "ria"), ("uniform", "sparsegpt")]),
    ],
)
def test_plans_and_masks_are_the_same(family: str, allocator: str, criterion: str):
    made = []
    for size in (1, 2, 8):
        model = build(family)
        batches = list(windows().split(size))
        table = billhook.measure(model, ["outlier_ratio:5", "wanda_mean", "wanda_median"], batches=batches)
        plan = billhook.allocate(table, 0.5, allocator=allocator)
        billhook.prune_(model, plan, criterion=criterion, batches=batches)
        made.append((plan.sparsity, {layer.name: layer.weight == 0 for layer in find_layers(model)}))
    for sparsity, masks in made[1:]:
        assert sparsity == pytest.approx(made[0][0], abs=1e-6)
        assert all(torch.equal(mask, made[0][1][name]) for name, mask in masks.items())
