"""Tuning what is left of pruned blocks: never worse, zeros fixed, the same twice, and what it says where it cannot
help."""

import functools
from itertools import pairwise

import pytest
import tiny
import torch
from resuming import whole_and_in_parts

from billhook import allocate, measure, prune_
from billhook.architectures.layers import find_layers
from billhook.engine import gradients as engine_gradients
from billhook.engine.batch import as_batches
from billhook.engine.capture import single_row_calls
from billhook.engine.loop import LayerResult
from billhook.engine.replay import Call, run_block
from billhook.engine.resources import Resources
from billhook.engine.walk import walk
from billhook.errors import BillhookError
from billhook.recovery import blockwise
from billhook.recovery.block_data import Data
from billhook.recovery.blockwise import Refine, kept_in, refine_block_
from billhook.tasks.text_generation import TASK

pytestmark = pytest.mark.gate

compute_gradients = functools.partial(engine_gradients.compute_gradients, loss=TASK.loss)


def text(windows: int = 16) -> list[torch.Tensor]:
    return list(torch.randint(0, 258, (windows, 24), generator=torch.Generator().manual_seed(0)).split(5))


def pruned(
    refine: Refine | None, windows: int = 16, build=tiny.llama, **options
) -> tuple[torch.nn.Module, list[LayerResult]]:
    model = build()
    return model, prune_(model, allocate(measure(model, []), 0.6), batches=text(windows), refine=refine, **options)


def error(model: torch.nn.Module, build=tiny.llama) -> float:
    """Mean squared difference of the logits from the dense model's on other text."""
    ids = torch.randint(0, 258, (4, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(ids).logits - build()(ids).logits).square().mean())


@pytest.mark.parametrize("dense_target", [0.5, *(pytest.param(x, marks=pytest.mark.nightly) for x in (0.0, 1.0))])
def test_tuning_reduces_the_error_and_keeps_zeros(dense_target: float) -> None:
    plain, before = pruned(None, windows=48)
    model, after = pruned(Refine(epochs=4, dense_target=dense_target, rate=0.01), windows=48)
    assert error(model) < error(plain)
    assert [r.zeros for r in before] == [r.zeros for r in after]
    for one, other in zip(find_layers(plain), find_layers(model), strict=True):
        assert one.block > 0 or torch.equal(one.weight == 0, other.weight == 0)
    notes = [note for result in after for note in result.notes]
    assert len(notes) == 3
    for note in notes:
        first, last = note.split("loss ")[1].split(" on ")[0].split(" -> ")
        assert float(last) < float(first)


@pytest.mark.nightly
def test_the_seed_decides_the_result() -> None:
    weights = [pruned(Refine(epochs=2, seed=seed))[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def single(model: torch.nn.Module) -> list[list[Call]]:
    """The calls of the first two blocks for a single window of each batch."""
    return [calls[:2] for calls in single_row_calls(model, as_batches(model, text()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_only_replaced_by_a_better_one(dtype: torch.dtype) -> None:
    model = tiny.llama().to(dtype)
    for block in walk(model, text(), read_only=True):
        targets = [torch.randn(h.shape, generator=torch.Generator().manual_seed(i)) for i, h in enumerate(block.inputs)]
        before = {name: value.clone() for name, value in block.module.state_dict().items()}
        parameters = kept_in(block.module, block.layers, True)
        # noise has nothing to be learnt, and a rate of 1 spoils any block
        result = refine_block_(
            block.module,
            Data(block.inputs, targets, block.calls, single(model), block.following),
            parameters,
            Refine(epochs=2, rate=30.0),
        )
        assert result.after == result.before
        assert all(torch.equal(value, before[name]) for name, value in block.module.state_dict().items())
        assert not any(p.requires_grad is False or p.grad is not None for p in block.module.parameters())
        break


def test_targets_are_between_those_of_the_dense_block_and_of_the_dense_model(monkeypatch) -> None:
    dense, model, seen = tiny.llama(num_hidden_layers=2), tiny.llama(num_hidden_layers=2), []

    def noted(module, data, tuned, options, index):
        seen.append(([h.clone() for h in data.inputs], [h.clone() for h in data.targets], data.calls))
        return blockwise.Refined(1.0, 1.0, 1)

    monkeypatch.setattr(blockwise, "refine_block_", noted)
    prune_(
        model, allocate(measure(model, []), 0.6), batches=text(), criterion="wanda", refine=Refine(dense_target=0.25)
    )
    inputs, targets, calls = seen[1]
    for ids, states, target, call in zip(text(), inputs, targets, calls, strict=True):
        whole = outputs_of_blocks(dense, ids, {})[1]
        with torch.no_grad():
            own = run_block(dense.model.layers[1], states, call)
        torch.testing.assert_close(target, 0.75 * own + 0.25 * whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def outputs_of_blocks(model: torch.nn.Module, ids: torch.Tensor, given: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """What each block returns and, last, the logits, where those of `given` return that instead of their own."""
    found: list[torch.Tensor] = []

    def note(index: int, output: torch.Tensor) -> torch.Tensor:
        found.append(given.get(index, output))
        return found[-1]

    hooks = [
        block.register_forward_hook(lambda _, __, out, i=i: note(i, out)) for i, block in enumerate(model.model.layers)
    ]
    found.append(model(ids).logits)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("build", [tiny.llama, tiny.mixtral])
def test_the_loss_of_a_block_is_that_of_the_following_block(build, monkeypatch) -> None:
    monkeypatch.setattr("billhook.recovery.block_data.PREDICTED", 7)
    model, ids = build(), torch.cat(text(3))[:3]
    for block in walk(model, [ids], read_only=True):
        one = [calls[block.index : block.index + 2] for calls in single_row_calls(model, as_batches(model, ids))]
        targets = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(block.index))
        loss = Data(block.inputs, [targets], block.calls, one, block.following).loss(block.module, (0, [2, 0]))
        here = outputs_of_blocks(model, ids, {})[block.index + 1][[2, 0]]
        if block.index + 1 < len(model.model.layers):
            there = targets[[2, 0]]
            expected = (here - there).square().sum() / there.square().sum()
        else:
            there = outputs_of_blocks(model, ids, {block.index: targets})[-1][[2, 0]]
            log_p, log_q = there.log_softmax(-1), here.log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_windows_of_several_lengths_are_tuned() -> None:
    model, batches = tiny.llama(), [torch.cat(text(9)), torch.cat(text(8))[:, :12], torch.cat(text(5)).repeat(1, 2)]
    results = prune_(model, allocate(measure(model, []), 0.6), batches=batches, refine=Refine(epochs=2, rate=0.01))
    losses = [note.split("loss ")[1].split(" on ")[0].split(" -> ") for r in results for note in r.notes]
    assert any(float(after) < float(before) for before, after in losses)


@pytest.mark.nightly
def test_gradients_behind_a_head_in_float16_are_not_lost(monkeypatch) -> None:
    def tuned(dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(0)
        model = tiny.llama(num_hidden_layers=1, vocab_size=4096).to(dtype)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.01)  # predictions nearly even, so that gradients are small
        plan = allocate(measure(model, []), 0.6)
        prune_(model, plan, criterion="magnitude", batches=[torch.cat(text(33))], refine=Refine(epochs=1, rate=0.01))
        return find_layers(model)[0].weight.float()

    before = find_layers(tiny.llama(num_hidden_layers=1, vocab_size=4096))[0].weight
    wide, narrow = (tuned(dtype) - before * (tuned(dtype) != 0) for dtype in (torch.float32, torch.float16))
    assert torch.nn.functional.cosine_similarity(wide.flatten(), narrow.flatten(), dim=0) > 0.9


def test_only_the_block_itself_is_tuned() -> None:
    model, plan = tiny.llama(), allocate(measure(tiny.llama(), []), 0.6)
    flags = [p.requires_grad for p in model.parameters()]
    seen: list[dict[str, torch.Tensor]] = []
    prune_(
        model,
        plan,
        batches=text(),
        refine=Refine(epochs=2),
        finished=lambda *_: seen.append({k: v.clone() for k, v in model.state_dict().items()}),
    )
    for index, (one, other) in enumerate(pairwise(seen), start=1):
        changed = {name for name in one if not torch.equal(one[name], other[name])}
        assert changed
        assert all(f".layers.{index}." in name for name in changed)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_norms_are_tuned_only_if_asked() -> None:
    dense = tiny.llama().state_dict()
    for tune_norms_and_biases in (False, True):
        model, _ = pruned(Refine(epochs=2, tune_norms_and_biases=tune_norms_and_biases))
        changed = [
            name for name, value in model.state_dict().items() if "norm" in name and not torch.equal(value, dense[name])
        ]
        assert bool(changed) == tune_norms_and_biases
        assert "model.norm.weight" not in changed


def test_layers_and_blocks_left_out_stay_as_they_are() -> None:
    model, dense = tiny.llama(), tiny.llama().state_dict()
    layers = [layer for layer in find_layers(model) if layer.block != 1 and "down_proj" not in layer.name]
    plan = allocate(measure(model, [], layers=layers), 0.6)
    results = prune_(model, plan, batches=text(), layers=layers, refine=Refine(epochs=2, tune_norms_and_biases=True))
    chosen = {f"{layer.name}.weight" for layer in layers}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, dense[name])}
    assert changed >= chosen
    assert all("norm" in name and ".layers.1." not in name for name in changed - chosen)
    assert sum(len(result.notes) for result in results) == 2


def test_experts_left_out_stay_as_they_are() -> None:
    model, dense = tiny.mixtral(), find_layers(tiny.mixtral())
    layers = [layer for layer in find_layers(model) if layer.expert in (0, 2)]
    results = prune_(
        model, allocate(measure(model, [], layers=layers), 0.6), batches=text(), layers=layers, refine=Refine(epochs=2)
    )
    assert "loss" in results[0].notes[-1]
    for layer, before in zip(find_layers(model), dense, strict=True):
        assert torch.equal(layer.weight, before.weight) == (layer.expert not in (0, 2)), layer.name


def test_experts_are_tuned_and_too_few_windows_are_not() -> None:
    model, results = pruned(Refine(epochs=1), build=tiny.mixtral)
    assert error(model, tiny.mixtral) < error(pruned(None, build=tiny.mixtral)[0], tiny.mixtral)
    few, results = pruned(Refine(epochs=1), windows=7)
    assert "7 calibration windows are fewer than 8" in results[0].notes[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(few.state_dict().values(), pruned(None, windows=7)[0].state_dict().values(), strict=True)
    )


def test_states_on_disk_give_the_same() -> None:
    one, other = (
        pruned(Refine(epochs=1), resources=Resources(spill_gib=limit))[0].state_dict() for limit in (8.0, 0.0)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("criterion", ["wanda", pytest.param("admm", marks=pytest.mark.nightly)])
def test_a_resumed_run_gives_the_same_weights(criterion: str, tmp_path) -> None:
    source, calibration = tiny.save(tmp_path / "model"), torch.cat(text(9))
    fields = {"sparsity": 0.5, "criterion": criterion, "calibration": calibration, "refine": "blocks+norms"}
    one, other = whole_and_in_parts(source, tmp_path, 2, **fields)
    assert one == other


def test_a_model_in_memory_starts_later_only_without_the_dense_model() -> None:
    model = tiny.llama()
    plan = allocate(measure(model, []), 0.5)
    with pytest.raises(BillhookError, match="dense_target=0"):
        prune_(model, plan, batches=text(), start=1, refine=Refine(epochs=1))
    done = prune_(model, plan, batches=text(), start=1, refine=Refine(epochs=1, dense_target=0))
    assert {result.layer.split(".")[2] for result in done} == {"1", "2"}


@pytest.mark.parametrize("options", [{"epochs": 0}, {"rate": 0.0}, {"dense_target": 1.5}])
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BillhookError, match="refine"):
        Refine(**options)


def test_text_is_needed() -> None:
    model = tiny.llama()
    with pytest.raises(BillhookError, match=r"^refine needs activations"):
        prune_(model, allocate(measure(model, []), 0.6), criterion="magnitude", refine=Refine())


@pytest.mark.parametrize("build", [tiny.llama, tiny.mixtral])
def test_regional_gradients_are_those_of_the_block_outputs(build, tmp_path) -> None:
    model, ids = build(), torch.cat(text(3))
    found = compute_gradients(model, [ids], "gradient_regional", tmp_path / "g.safetensors")
    layers = find_layers(model)
    for block in walk(model, list(ids.split(1)), read_only=True):
        if block.index:
            continue
        layer = block.layers[-1]
        squares = torch.zeros(layer.shape)
        for inputs, call in zip(block.inputs, block.calls, strict=True):
            with torch.enable_grad():
                parameter = getattr(layer.module, layer.parameter)
                (gradient,) = torch.autograd.grad(run_block(block.module, inputs, call).norm(), [parameter])
            gradient = gradient if layer.expert is None else gradient[layer.expert]
            squares += (gradient.T if layer.transposed else gradient).square()
        torch.testing.assert_close(found[layer.name], (squares / 3).sqrt())
    assert set(found) == {layer.name for layer in layers}
