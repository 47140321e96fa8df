"""Fisher information of outputs: the same as by a backward pass through the whole model, and what noise costs."""

import statistics

import bert
import pytest
import torch
from families import VOCABULARY, build

from billhook.architectures.layers import find_layers, observable_experts
from billhook.evaluation.scoring import NEXT_TOKEN
from billhook.measurement.fisher import fisher
from billhook.tasks.feature_extraction import FeatureExtraction


def sequences(count: int, length: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row} for row in ids.split(1)]


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.nightly)])
def test_it_equals_the_squares_of_a_whole_backward_pass(family):
    model, batches = build(family), sequences(3)
    layers = find_layers(model)
    squares = {layer.name: [] for layer in layers}
    handles = []

    def watched(name):
        return lambda m, args, output: output.register_hook(lambda g: squares[name].append(g.square())) and None

    for layer in layers:
        handles.append(layer.module.register_forward_hook(watched(layer.name)))
    generator = torch.Generator().manual_seed(7)
    for batch in batches:
        log_p = model(**batch).logits[0, :-1].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
    for handle in handles:
        handle.remove()
    expected = {name: float(torch.cat(found).mean()) for name, found in squares.items()}
    assert fisher(model, layers, batches, NEXT_TOKEN, seed=7) == pytest.approx(expected, rel=1e-4)


def test_experts_in_one_product_count_the_tokens_that_they_receive():
    model, batches = build("llama4_text"), sequences(2)
    chosen = [layer for layer in find_layers(model) if layer.kind.endswith("down_proj") and layer.expert is not None]
    experts = chosen[0].module
    found, received, gradients = fisher(model, chosen, batches, NEXT_TOKEN, seed=7), [], []

    def watched(module, args, output):
        received.append(args[0].view(6, -1, 32).any(-1))
        output.register_hook(lambda g: gradients.append(g.view(6, -1, 32)))

    handle = experts.register_forward_hook(watched)
    generator = torch.Generator().manual_seed(7)
    for batch in batches:
        log_p = model(**batch).logits[0, :-1].log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        log_p.gather(1, drawn).sum().backward()
    handle.remove()
    for layer in chosen[:6]:
        assert layer.expert is not None
        own = [g[layer.expert][rows[layer.expert]] for g, rows in zip(gradients, received, strict=True)]
        expected = float(torch.cat(own).square().mean()) if sum(map(len, own)) else 0.0
        assert found[layer.name] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_small_noise_on_a_layers_output_costs_half_of_it_per_square():
    model, batches = build("llama"), sequences(16)
    layers = [layer for layer in find_layers(model) if layer.block == 1]
    found = fisher(model, layers, batches, NEXT_TOKEN)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    dense = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    for layer in layers:
        size, draws, total = 1e-2 / found[layer.name] ** 0.5, 6, 0.0
        handle = layer.module.register_forward_hook(lambda m, a, y, size=size: y + size * torch.randn_like(y))
        torch.manual_seed(0)
        for _ in range(draws):
            noisy = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
            total += float((dense.exp() * (dense - noisy)).sum()) / draws
        handle.remove()
        cost = 0.5 * found[layer.name] * size**2 * layer.shape[0] * ids.numel()
        assert total == pytest.approx(cost, rel=0.25), layer.name


@pytest.mark.gate
@torch.no_grad()
def test_without_predictions_noise_costs_cosine_distance():
    model = bert.model().bert
    batches, noise = sequences(12), torch.Generator().manual_seed(0)
    layers = [layer for layer in find_layers(model) if layer.block == 1]
    found = {name: statistics.fmean(values) for name, values in _several(model, layers, batches).items()}
    ids = torch.cat([batch["input_ids"] for batch in batches])

    def embedded() -> torch.Tensor:
        return model(input_ids=ids).last_hidden_state.double().mean(1)

    dense = embedded()
    for layer in layers:
        size, draws, total = 2e-3 / found[layer.name] ** 0.5, 20, 0.0

        def noisy(m, a, y, size=size):
            return y + size * torch.randn(y.shape, generator=noise)

        handle = layer.module.register_forward_hook(noisy)
        for _ in range(draws):
            total += float((1 - torch.cosine_similarity(embedded(), dense)).sum()) / draws
        handle.remove()
        cost = 0.5 * found[layer.name] * size**2 * layer.shape[0] * ids.numel()
        assert total == pytest.approx(cost, rel=0.25), layer.name


def _several(model, layers, batches):
    """The information from several draws, of which one a sequence is few where a sequence has one embedding."""
    runs = [fisher(model, layers, batches, FeatureExtraction(), seed=seed) for seed in range(6)]
    return {layer.name: [run[layer.name] for run in runs] for layer in layers}


def test_every_expert_that_receives_tokens_has_its_own():
    model = build("mixtral")
    layers = find_layers(model)
    with observable_experts(model):
        found = fisher(model, layers, sequences(8), NEXT_TOKEN)
    experts = [found[layer.name] for layer in layers if layer.expert is not None]
    assert len(set(experts)) == len(experts)
    assert min(experts) > 0
