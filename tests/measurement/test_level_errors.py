"""Errors of layers that are quantized together equal those of each layer alone."""

import pytest
import tiny
import torch

from billhook.architectures.layers import find_layers
from billhook.engine.walk import walk
from billhook.measurement import level_errors as module
from billhook.measurement.level_errors import level_errors
from billhook.methods.quantize.gptq import gptq
from billhook.methods.quantize.grids import grid_of

TYPES = ["int2/16", "q4_0"]


@torch.no_grad()
def test_errors_equal_those_of_gptq_on_each_layer_alone(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)
    model = tiny.llama(num_hidden_layers=1, intermediate_size=64)
    layers = find_layers(model)
    ids = torch.randint(0, 256, (6, 32), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids.split(2)]
    found = level_errors(model, layers, batches, {layer.name: TYPES for layer in layers})
    for block in walk(model, batches, ("gram",), read_only=True):
        for layer in block.layers:
            stats, out = block.stats[layer.name], layer.shape[0]
            rows = torch.linspace(0, out - 1, 8, dtype=torch.float64).round().long()
            W, gram = layer.weight[rows].float(), stats.gram
            for type in TYPES:
                made = gptq(W, stats, grid_of(type), dense_target=0.0, sweeps=0).decode(torch.float32)
                share = len(gram) / (len(gram) + ids.numel())
                other = gram * (1 - share) + torch.diag(gram.diagonal()) * share
                expected = ((W - made) @ other * (W - made)).sum() / (W @ gram * W).sum()
                assert found.errors[layer.name][type] == pytest.approx(float(expected), rel=1e-3)
            power = float((W @ gram * W).sum()) * out / 8 / ids.numel()
            assert found.power[layer.name] == pytest.approx(power, rel=1e-5)


def test_layers_with_the_same_input_are_factorized_once(monkeypatch):
    calls = []
    factor = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *args: calls.append(1) or factor(*args))
    model = tiny.llama(num_hidden_layers=1)
    layers, ids = find_layers(model), torch.randint(0, 256, (2, 16))
    level_errors(model, layers, [{"input_ids": ids}], {layer.name: TYPES for layer in layers})
    assert len(calls) == 4  # of q, k, v; o; gate, up; down
