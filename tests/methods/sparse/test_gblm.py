"""GBLM-Pruner's scores against plain loops, in both modes; experts that the text never reaches."""

import math
from typing import Any

import pytest
import torch
from families import VOCABULARY, build
from tiny import llama

from billhook import CRITERIA, BillhookError, Plan, find_layers, prune_
from billhook.engine.walk import walk
from billhook.methods.masks import Select
from billhook.methods.statistics import LayerStats
from billhook.plan.spec import Pattern

Tensor = torch.Tensor
ROWS, COLUMNS, SEQUENCES = 5, 24, 9


def example() -> tuple[Tensor, LayerStats]:
    generator = torch.Generator().manual_seed(0)
    W, gradient = (torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2))
    norm = torch.rand(COLUMNS, generator=generator)
    return W, LayerStats(100, SEQUENCES, norm, gradient=gradient.abs() * norm.mean() / 20)


def removed(W: Tensor, stats: LayerStats, name: str, **options: Any) -> set[tuple[int, int]]:
    result = CRITERIA.get(name)(W, stats, Select((ROWS, COLUMNS), 0.5, ROWS * COLUMNS // 2), **options)
    assert torch.equal(result[result != 0], W[result != 0])
    return {(r, c) for r, c in (result == 0).nonzero().tolist()}


def slow(W: Tensor, score: Any) -> set[tuple[int, int]]:
    """The half of each row with the lowest score(|w|, row, column), in plain Python."""
    found = set()
    for r, row in enumerate(W.tolist()):
        order = sorted(range(COLUMNS), key=lambda c: score(abs(row[c]), r, c))
        found |= {(r, c) for c in order[: COLUMNS // 2]}
    return found


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_paper_mode_weighs_two_sums(scale: float) -> None:
    W, stats = example()
    norm, G = stats.input_norm.tolist(), stats.gradient.tolist()
    expected = slow(W, lambda w, r, c: w * norm[c] * math.sqrt(SEQUENCES) + scale * w * G[r][c])
    assert removed(W, stats, "gblm", scale=scale) == expected
    if scale == 0:
        assert expected == removed(W, stats, "wanda")


@pytest.mark.parametrize("scale", [50.0, 100.0])
def test_reference_mode_divides_the_inputs_alone(scale: float) -> None:
    W, stats = example()
    norm, G = stats.input_norm.tolist(), stats.gradient.tolist()
    assert removed(W, stats, "gblm", mode="reference", scale=scale) == slow(
        W, lambda w, r, c: w * norm[c] + w * G[r][c] * scale / 100
    )


def test_the_gradient_criterion_multiplies_weight_and_gradient() -> None:
    W, stats = example()
    G = stats.gradient.tolist()
    assert removed(W, stats, "gradient") == slow(W, lambda w, r, c: w * G[r][c])


@pytest.mark.parametrize(
    "options, statistic",
    [
        ({}, "gradient_l1"),
        ({"norm": "l2"}, "gradient_l2"),
        ({"mode": "reference"}, "gradient_l1_reference"),
        ({"norm": "l2", "mode": "reference"}, "gradient_l2_reference"),
    ],
)
def test_the_statistics_read_depend_on_the_options(options: dict[str, str], statistic: str) -> None:
    assert CRITERIA.needs("gblm", CRITERIA.configure("gblm", options)) == ("input_norm", statistic)


@pytest.mark.parametrize("scale", [-1.0, math.inf])
def test_scales_that_are_not_finite_or_negative_are_refused(scale: float) -> None:
    W, stats = example()
    with pytest.raises(BillhookError, match="gblm: scale must be 0 or more"):
        removed(W, stats, "gblm", scale=scale)


def test_both_modes_agree_on_one_sequence() -> None:
    """With one sequence and a model in float32, the two modes differ by float16 rounding of gradients alone."""
    ids = torch.randint(VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    masks = []
    for mode in ("paper", "reference"):
        model = llama()
        prune_(model, plan(model), criterion="gblm", batches=ids, mode=mode)
        masks.append(torch.cat([layer.weight.flatten() != 0 for layer in find_layers(model)]))
    assert (masks[0] != masks[1]).float().mean() < 0.005


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("criterion", ["gblm", "gradient"])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gpt_oss"])
def test_plans_are_met_exactly(family: str, criterion: str, pattern: str) -> None:
    model = build(family)
    ids = [torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))]
    results = prune_(model, plan(model, Pattern.parse(pattern)), criterion=criterion, batches=ids)
    assert all(result.zeros == result.n // 2 for result in results)


def plan(model: Any, pattern: Pattern | None = None) -> Plan:
    return Plan.of_sparsities(0.5, pattern or Pattern(), {layer.name: 0.5 for layer in find_layers(model)})


@pytest.mark.parametrize(
    "criterion, note", [("gblm", "received no calibration token"), ("gradient", "has no gradient")]
)
def test_an_expert_that_no_token_reaches_is_pruned_by_magnitude(criterion: str, note: str) -> None:
    model = build("mixtral")
    ids = [torch.randint(VOCABULARY, (1, 2), generator=torch.Generator().manual_seed(3))]
    starved = {
        name
        for block in walk(model, ids, ("input_norm",), read_only=True)
        for name, stats in block.stats.items()
        if not stats.tokens
    }
    assert starved
    results = prune_(model, plan(model), criterion=criterion, batches=ids)
    reported = {result.layer for result in results if result.notes == (f"{note}: pruned by magnitude",)}
    assert reported
    for layer in find_layers(model):
        if layer.name in reported:
            kept = layer.weight[layer.weight != 0].abs().min()
            assert kept > 0.05, layer.name  # the median of |N(0, 0.15)| is 0.1: nothing small was kept
