"""Which weights are prunable layers."""

import pytest
import tiny
from torch import nn

from billhook.architectures.layers import find_layers


def kinds(model) -> set[str]:
    return {layer.kind for layer in find_layers(model)}


@pytest.mark.parametrize(
    "path",
    ["router.proj", "altup.modality_router", "gate", "mlp.gate.inner", "wg", "shared_expert_gate", "ffn.classifier"],
)
def test_routers_are_left_alone(path):
    model = tiny.llama(num_hidden_layers=1)
    before, module = kinds(model), model.model.layers[0]
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, nn.Module())
        module = getattr(module, name)
    module.add_module(last, nn.Linear(32, 32))
    assert kinds(model) == before


def test_a_linear_layer_with_an_output_per_expert_is_left_alone():
    model = tiny.mixtral(num_local_experts=24)
    before = kinds(model)
    model.model.layers[0].add_module("choice", nn.Linear(32, 24))
    assert kinds(model) == before
    model.model.layers[0].add_module("other", nn.Linear(32, 25))
    assert kinds(model) == before | {"other"}


@pytest.mark.parametrize("shape", [(2, 2), (32, 4), (4, 32)])
def test_small_matrices_are_not_pruned(shape):
    model = tiny.llama(num_hidden_layers=1)
    before = kinds(model)
    model.model.layers[0].add_module("coefficients", nn.Linear(*shape))
    assert kinds(model) == before
