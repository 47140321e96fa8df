"""Blocks get the inputs and arguments with which the model calls them, batch by batch and row by row."""

import pytest
import torch
from families import VOCABULARY, build

from billhook import BillhookError, measure
from billhook.architectures.stacks import blocks_of
from billhook.engine.capture import single_row_calls
from billhook.engine.replay import run_block
from billhook.engine.walk import walk

Batch = dict[str, torch.Tensor]


def batches() -> list[Batch]:
    """Of one shape with other masks, of another length, and as the first again."""
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int, length: int, padding: list[int]) -> Batch:
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        mask = (torch.arange(length) >= torch.tensor(padding)[:, None]).long()  # padded on the left
        return {"input_ids": ids, "attention_mask": mask}

    return [batch(3, 16, [0, 4, 9]), batch(3, 16, [5, 0, 1]), batch(2, 11, [3, 0]), batch(3, 16, [0, 4, 9])]


def of_the_model(model: torch.nn.Module, given: list[Batch]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs and outputs of each block for each batch, from runs of the whole model."""
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in blocks_of(model)]
    hooks = [
        block.register_forward_hook(
            lambda _, args, kwargs, out, n=number: seen[n].append(
                ((args[0] if args else kwargs["hidden_states"]).clone(), out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
        for number, block in enumerate(blocks_of(model).values())
    ]
    with torch.no_grad():
        for batch in given:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_batches_with_other_masks_and_lengths_are_replayed_with_their_own(family: str, read_only: bool) -> None:
    model = build(family)
    expected = of_the_model(model, batches())
    for block in walk(model, batches(), ("input_norm",), read_only=read_only):
        for found, (inputs, _) in zip(block.inputs, expected[block.index], strict=True):
            assert torch.equal(found, inputs)
        for layer in block.layers:
            assert layer.expert is not None or block.stats[layer.name].sequences == 11


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2"])
def test_some_rows_of_a_batch_are_replayed_with_their_own_arguments(family: str) -> None:
    model = build(family)
    single, expected = single_row_calls(model, batches()), of_the_model(model, batches())
    for block in walk(model, batches(), read_only=True):
        of_batches = zip(block.inputs, block.calls, single, expected[block.index], strict=True)
        for inputs, call, one, (_, outputs) in of_batches:
            rows = torch.tensor([1, 0])
            part = call.part(rows, one[block.index], inputs.dtype)
            found = run_block(block.module, inputs[rows], part)
            torch.testing.assert_close(found, outputs[rows], rtol=1e-4, atol=1e-5)


class Twice(torch.nn.ModuleList):
    """Blocks through which a model runs twice, as looped transformers do."""

    def __getitem__(self, key):
        found = super().__getitem__(key)
        return [*found, *found] if isinstance(key, slice) else found


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("runs all twice", "runs model.layers.0 again after model.layers.3"),
        ("leaves out the last", "does not run model.layers.2"),
    ],
)
def test_a_model_that_does_not_run_each_block_once_is_refused_by_name(case: str, message: str) -> None:
    model = build("llama")
    if case == "runs all twice":
        model.model.layers = Twice(model.model.layers)
    else:
        model.config.num_hidden_layers = 2
    with pytest.raises(BillhookError, match=f"LlamaForCausalLM cannot be pruned: it {message}"):
        next(walk(model, batches(), ("input_norm",)))
    with pytest.raises(BillhookError, match=message):
        measure(model, "wanda_mean", batches=batches()[0])
