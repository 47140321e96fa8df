"""The dense model beside the pruned one: what has drifted, the order of layers, who writes into the stream, and what
aiming gives."""

import copy

import pytest
import tiny
import torch
import vision_families
from families import FAMILIES, VOCABULARY, build
from resuming import whole_and_in_parts

from billhook import allocate, measure, prune, prune_
from billhook.architectures.layers import find_layers
from billhook.engine.dense_stream import token_weights
from billhook.engine.walk import walk
from billhook.errors import BillhookError
from billhook.methods.least_squares import inverse_factor, loss, shift_to_dense
from billhook.methods.statistics import LayerStats

Tensor = torch.Tensor
IDS = torch.randint(VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))
WRITERS = {  # of a block; what comes after a norm of its own, is scaled, or is an expert's does not write as it is
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "opt": {"self_attn.out_proj", "fc2"},
    "gemma2": set(),
    "olmo2": set(),
    "mixtral": {"self_attn.o_proj"},
    "falcon": {"self_attention.dense", "mlp.dense_4h_to_h"},
    "phi": {"self_attn.dense", "mlp.fc2"},
    "llama": {"self_attn.o_proj", "mlp.down_proj"},
}


def inputs(model: torch.nn.Module, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What enters modules in one run of the whole model, float64 [tokens, in]."""
    seen, handles = {}, []
    modules = dict(model.named_modules())
    for name in names:
        handles.append(
            modules[name].register_forward_pre_hook(
                lambda m, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).double())
            )
        )
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def weights_in_loops(stream: Tensor) -> Tensor:
    """How much tokens [tokens, width] of the sequences of IDS count, [tokens, 1], in plain loops."""
    found = []
    for sequence in stream.view(*IDS.shape, -1):
        squares = [float(token.square().mean()) for token in sequence]
        typical = sorted(squares)[(len(squares) - 1) // 2]
        found += [1.0 if square <= typical else typical / square for square in squares]
    return torch.tensor(found, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("batch", [6, 2])
def test_drift_is_the_difference_of_whole_models(batch: int) -> None:
    dense = build("llama")
    model, order = copy.deepcopy(dense), []
    modules = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    norms = [f"model.layers.{i}.input_layernorm" for i in range(4)] + ["model.norm"]
    for block in walk(model, IDS.split(batch), ("gram", "drift")):
        for layers, stats in block.stages:
            order.append([layer.kind for layer in layers])
            name = layers[0].name
            before = f"{block.name}.{modules.get(layers[0].kind, 'input_layernorm')}"
            stream = norms[block.index + (layers[0].kind == "mlp.down_proj")]
            here, there = (inputs(m, IDS, [name, before, stream]) for m in (model, dense))
            root = weights_in_loops(there[stream]).sqrt() if layers[0].kind in modules else 1
            x, drift = here[name] * root, (there[name] - here[name]) * root
            for layer in layers:
                torch.testing.assert_close(stats[layer.name].gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)
                if layer.kind == "mlp.down_proj":
                    assert stats[layer.name].drift is None
                else:
                    torch.testing.assert_close(stats[layer.name].drift.double(), drift.T @ x, rtol=1e-3, atol=1e-3)
            owed = stats[name].stream_drift
            assert (owed is not None) == (layers[0].kind in modules)
            if owed is not None:
                expected = ((there[before] - here[before]) * root).T @ x
                if stats[name].drift is None:
                    expected += layers[0].weight.double() @ drift.T @ x
                torch.testing.assert_close(owed.double(), expected, rtol=1e-3, atol=2e-3)
            for layer in layers:
                layer.weight.mul_((torch.rand(layer.shape, generator=torch.Generator().manual_seed(2)) < 0.7).float())
    qkv = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert order == 4 * [qkv, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (2, 5, 1, 3)])
def test_a_huge_token_counts_less_and_zeros_do_no_harm(shape: tuple[int, ...]) -> None:
    hidden = torch.ones(shape)
    hidden.view(-1, 5, 3)[:, 0] *= 10
    found = token_weights(hidden)
    huge = hidden[..., :1] > 1
    assert found.shape == huge.shape
    torch.testing.assert_close(found, torch.where(huge, 0.01, 1.0))
    assert token_weights(0 * hidden).eq(1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_comes_once(family: str) -> None:
    model = build(family)
    plan = allocate(measure(model, []), 0.5)
    results = prune_(model, plan, criterion="admm", batches=IDS.split(3), steps=3)
    assert sorted(r.layer for r in results) == sorted(layer.name for layer in find_layers(model))
    assert [r.zeros for r in results] == [plan.zeros({r.layer: r.shape for r in results})[r.layer] for r in results]


@pytest.mark.parametrize("family", WRITERS)
def test_layers_that_write_into_the_residual_stream_are_known(family: str) -> None:
    found = set()
    for block in walk(build(family), [IDS], ("gram", "drift")):
        for layers, stats in block.stages:
            found |= {layer.kind for layer in layers if stats[layer.name].stream_drift is not None}
    assert found == WRITERS[family]


@pytest.mark.parametrize("window", [3, 4])
def test_tokens_that_a_layer_sees_in_another_order_than_the_stream_are_not_compared_with_it(window: int) -> None:
    model = vision_families.build("swin", window_size=window)
    images = {"pixel_values": torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    found = set()
    for block in walk(model, [images], ("gram", "drift")):
        for layers, stats in block.stages:
            found |= {layer.name for layer in layers if stats[layer.name].stream_drift is not None}
            for layer in layers:
                layer.weight.mul_((layer.weight.abs() > 0.1).float())
    alone = {name for name in found if "attention" in name}  # whose only window is the image
    assert all("layers.1." in name for name in alone)
    assert bool(alone) == (window == 4)
    assert len(found - alone) == 4


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("dense_target", [0.0, 0.3, 1.0])
def test_weights_with_a_dense_target_are_the_optimum(dense_target: float, factored: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn(200, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    other = x + 0.3 * other
    W, stream = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((5, 12), (200, 5)))
    gram, drift = x.T @ x, (other - x).T @ x
    stats = LayerStats(200, 1, gram=gram, drift=drift, stream_drift=stream.T @ x)
    U = inverse_factor(gram, gram.diagonal() <= 0, 1e-4, stats) if factored else None
    found = shift_to_dense(W, stats, dense_target, 1e-4, U)
    target = x @ W.T + dense_target * ((other - x) @ W.T + stream)
    best = torch.linalg.lstsq(x, target).solution.T
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)
    V = W * (W.abs() > 0.5)
    excess = (x @ V.T - target).square().sum(0) - (x @ best.T - target).square().sum(0)
    torch.testing.assert_close(loss(best, V, gram), excess)


def test_without_drift_or_tokens_a_dense_target_changes_nothing() -> None:
    W, gram = torch.randn(3, 4), torch.eye(4)
    assert shift_to_dense(W, LayerStats(8, 1, gram=gram), 0.5, 0.01) is W
    assert torch.equal(shift_to_dense(W, LayerStats(8, 1, gram=gram, drift=torch.zeros(4, 4)), 0.5, 0.01), W)
    assert shift_to_dense(W, LayerStats(0, 0, gram=0 * gram, drift=torch.ones(4, 4)), 0.5, 0.0) is W
    assert shift_to_dense(W, LayerStats(8, 1, gram=0 * gram, drift=0 * gram), 0.5, 0.0).isfinite().all()


@pytest.mark.gate
@pytest.mark.parametrize("criterion", ["admm", "sparsegpt"])
def test_a_dense_target_reduces_the_error_of_the_logits(criterion: str) -> None:
    dense, errors = tiny.llama(), []
    ids = torch.randint(0, 258, (32, 64), generator=torch.Generator().manual_seed(3))
    for dense_target in (0.0, 0.5):
        model = tiny.llama()
        prune(model, sparsity=0.6, criterion=criterion, calibration=ids[:24], dense_target=dense_target)
        with torch.no_grad():
            errors.append(float((model(ids[24:]).logits - dense(ids[24:]).logits).square().mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.gate
@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_uses_the_dense_model(done: int, tmp_path) -> None:
    source = tiny.save(tmp_path / "model", dtype=torch.bfloat16)
    fields = {
        "sparsity": 0.5,
        "criterion": "admm",
        "calibration": torch.randint(0, 258, (6, 24), generator=torch.Generator().manual_seed(5)),
    }
    one, other = whole_and_in_parts(source, tmp_path, done, **fields)
    assert one == other


def test_a_run_on_a_model_in_memory_cannot_be_resumed() -> None:
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    plan = allocate(measure(model, []), 0.5)
    with pytest.raises(BillhookError, match="dense_target=0"):
        prune_(model, plan, criterion="admm", batches=[IDS], start=1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prune_(model, plan, criterion="admm", batches=[IDS], start=1, dense_target=0)
