"""The loop checks what a criterion returns against the plan, and writes nothing else."""

from collections.abc import Callable

import pytest
import tiny
import torch

from billhook import JobError, allocate, find_layers, measure, prune_
from billhook.engine.loop import apply_plan_
from billhook.engine.method import Method, Quantization
from billhook.engine.walk import Block
from billhook.methods.masks import Select
from billhook.methods.quantize import QUANTIZERS
from billhook.registry import method
from billhook.steps.types import uniform_plan

Tensor = torch.Tensor
Fault = Callable[[Tensor, Tensor], Tensor]  # of the weight and the mask of the plan


def one_too_few(W: Tensor, keep: Tensor) -> Tensor:
    row, column = (~keep).nonzero()[-1]
    keep[row, column] = True
    return W * keep


def one_too_many(W: Tensor, keep: Tensor) -> Tensor:
    row, column = keep.nonzero()[0]
    keep[row, column] = False
    return W * keep


def one_in_another_group(W: Tensor, keep: Tensor) -> Tensor:
    """One weight more in the first group of four, one less in the second."""
    keep[0, :8] = torch.tensor([True, True, True, False, True, False, False, False])
    return W * keep


def nothing(W: Tensor, keep: Tensor) -> Tensor:
    return W.clone()


def everything(W: Tensor, keep: Tensor) -> Tensor:
    return torch.zeros_like(W)


def infinite(W: Tensor, keep: Tensor) -> Tensor:
    return (W * keep) / 0


@pytest.mark.parametrize(
    ("fault", "pattern", "message"),
    [
        (one_too_few, "unstructured", r"511 weights are zero where the plan asks for 512"),
        (one_too_many, "unstructured", r"513 weights are zero where the plan asks for 512"),
        (one_too_few, "2:4", r"more than 2 of 4 consecutive weights are left"),
        (one_too_many, "2:4", r"513 weights are zero where the plan asks for 512"),
        (one_in_another_group, "2:4", r"more than 2 of 4 consecutive weights are left"),
        (nothing, "unstructured", r"0 weights are zero where the plan asks for 512"),
        (everything, "unstructured", r"1024 weights are zero where the plan asks for 512"),
        (infinite, "unstructured", r"not finite"),
    ],
)
def test_a_criterion_that_does_not_remove_what_is_planned_is_an_error_that_names_the_layer(
    fault: Fault, pattern: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @method(paper="none", group="row")
    def faulty(W: Tensor, stats: object, select: Select) -> Tensor:
        return fault(W, select(W.abs()))

    monkeypatch.setattr("billhook.methods.sparse.magnitude.magnitude", faulty)
    model = tiny.llama()
    plan = allocate(measure(model, []), 0.5, pattern=pattern)
    with pytest.raises(JobError, match=rf"^model\.layers\.0\.self_attn\.q_proj: .*{message}"):
        prune_(model, plan, criterion="magnitude")


def test_weights_that_were_zero_before_are_noted_and_no_error() -> None:
    model = tiny.llama(num_hidden_layers=1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[:24] = 0
    first, *others = prune_(model, allocate(measure(model, []), 0.5), criterion="magnitude")
    assert (first.zeros, first.zeros_before) == (768, 768)
    assert first.notes == ("256 more zeros than planned (768 weights were zero before)",)
    assert not any(result.notes for result in others)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_the_error_of_a_layer_is_that_of_its_outputs_for_uncorrelated_inputs(criterion: str) -> None:
    model, ids = tiny.llama(), torch.randint(0, 258, (4, 24), generator=torch.Generator().manual_seed(0))
    layer, seen = find_layers(model)[0], list[Tensor]()
    handle = layer.module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    before = layer.weight.double()
    squares = torch.ones(32, dtype=torch.float64) if criterion == "magnitude" else seen[0].square().sum(0)
    plan = allocate(measure(model, [], layers=[layer]), 0.5)
    (result,) = prune_(model, plan, criterion=criterion, batches=ids, layers=[layer])
    change = ((layer.weight.double() - before).square() * squares).sum()
    assert result.error == pytest.approx(float(change / (before.square() * squares).sum()), rel=1e-4)


def test_tuning_that_revives_a_removed_weight_is_an_error() -> None:
    class Reviving:
        wants_dense_outputs = False

        def note(self, block: Block) -> None:
            pass

        def tune_(self, block: Block) -> str:
            weight = block.layers[1].weight
            weight[weight == 0] = (torch.arange(int((weight == 0).sum())) < 3).float()
            return "tuned"

    model, ids = tiny.llama(), torch.zeros(2, 8, dtype=torch.int64)
    plan, method = allocate(measure(model, []), 0.5), Method("magnitude", {})
    with pytest.raises(JobError, match=r"^model\.layers\.0\.self_attn\.k_proj: tuning made 3 removed weights nonzero"):
        apply_plan_(model, plan, method, [{"input_ids": ids}], tuner=Reviving())


class Moves:
    """A tuner that moves every value, as it can the minimum of a type."""

    wants_dense_outputs = False

    def note(self, block: Block) -> None:
        pass

    def tune_(self, block: Block) -> str:
        for layer in block.layers:
            layer.weight.add_(1)
        return "moved"


def test_zeros_of_quantized_layers_are_counted_after_tuning_the_lost_ones_too():
    model = tiny.llama(num_hidden_layers=1)
    layers = find_layers(model)
    for layer in layers:
        layer.weight.data[:, ::2] = 0
    plan, _ = uniform_plan("q8_0", layers)
    method = Quantization("round", QUANTIZERS.configure("round", {}))
    ids = torch.arange(16)[None]
    results = apply_plan_(model, plan, method, [{"input_ids": ids}], tuner=Moves())
    assert [(r.zeros, r.refilled) for r in results] == [(0, layer.weight.numel() // 2) for layer in layers]
