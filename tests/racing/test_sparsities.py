"""`--allocator rco` for sparsities: exact, deterministic, and more is removed where it costs less."""

import pytest
import tiny
import torch

from billhook import BillhookError, allocate, measure, search
from billhook.architectures.layers import find_layers
from billhook.plan.spec import Pattern
from billhook.racing.sparsities import LEVELS, menu
from billhook.steps.prune import prepare
from billhook.steps.prune_job import PruneRequest

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 258, (16, 24), generator=torch.Generator().manual_seed(0))
FREE = "model.layers.1.mlp.down_proj"  # most of its weights are zero from the start


def model_with_a_sparse_layer():
    model = tiny.llama(num_hidden_layers=2)
    weight = next(layer.weight for layer in find_layers(model) if layer.name == FREE)
    with torch.no_grad():
        weight *= weight.abs() >= weight.abs().quantile(0.8)
    return model


def test_more_is_removed_where_it_costs_nothing():
    model = model_with_a_sparse_layer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fields = {"allocator": "rco", "calibration": IDS, "options": {"steps": 20, "rate": 0.3, "windows": 2}}
    job, again = (prepare(PruneRequest(model, 0.5, criterion="magnitude", **fields)) for _ in range(2))
    assert job.plan == again.plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shapes = {layer.name: layer.shape for layer in job.opened.layers}
    assert sum(job.plan.zeros(shapes).values()) == round(0.5 * sum(a * b for a, b in shapes.values()))
    assert job.plan.sparsity[FREE] == max(job.plan.sparsity.values()) > 0.6
    racing = job.plan.made_by["racing"]
    assert racing["tried"]["rco"] < racing["tried"]["uniform"]
    assert job.plan.made_by["allocator"] == "rco"
    assert job.plan.made_by["options"]["steps"] == 20


@pytest.mark.parametrize("criterion", ["sparsegpt", "gblm"])
def test_criteria_with_updates_and_gradients_within_n_of_m(criterion: str):
    options = {"steps": 2, "windows": 2}
    fields = {"allocator": "rco", "criterion": criterion, "calibration": IDS, "options": options}
    plan = prepare(PruneRequest(tiny.llama(num_hidden_layers=2), pattern="4:8", **fields)).plan
    assert all(round(8 * s) == pytest.approx(8 * s) for s in plan.sparsity.values())


@pytest.mark.parametrize("target", [0.0, 0.05, 0.5, 0.95])
def test_levels_lie_around_the_target_and_leave_something(target: float):
    levels = menu(target, Pattern())
    assert len(levels) == LEVELS
    assert levels == sorted(levels)
    assert sum(levels) / LEVELS == pytest.approx(target)
    assert levels[0] >= 0
    assert levels[-1] < 1
    assert [k / 4 for k in range(4)] == menu(0.5, Pattern.parse("2:4"))


def test_what_has_no_model_or_nothing_to_search_says_so():
    with pytest.raises(BillhookError, match="rco tries plans on a model"):
        allocate(measure(tiny.llama(), []), 0.5, allocator="rco")
    with pytest.raises(BillhookError, match="prune --allocator rco"):
        search(tiny.llama(), 0.5, allocator="rco", calibration=IDS)
    with pytest.raises(BillhookError, match="rate"):
        prepare(PruneRequest(tiny.llama(), 0.5, allocator="rco", calibration=IDS, options={"rat": 1}))
