"""Errors of block outputs, against an obvious calculation."""

from dataclasses import replace

import pytest
import torch
from tiny import llama

from billhook import allocate, measure, prune_
from billhook.evaluation.block_errors import block_errors, block_outputs
from billhook.plan.spec import Spec

TOKENS = {"input_ids": torch.randint(258, (8, 32), generator=torch.Generator().manual_seed(1))}


def errors(plan):
    model = llama()
    dense = block_outputs(model, TOKENS)
    prune_(model, plan, criterion="magnitude", batches=[])
    return block_errors(block_outputs(model, TOKENS), dense)


def test_outputs_are_the_hidden_states_after_each_block():
    model = llama()
    with torch.no_grad():
        hidden = [model.model(row[None], output_hidden_states=True).hidden_states for row in TOKENS["input_ids"]]
    for index, output in enumerate(block_outputs(model, TOKENS)[:-1]):  # the last hidden state is behind the norm
        assert torch.equal(output, torch.cat([states[index + 1] for states in hidden]))


def test_errors_grow_with_the_sparsity_in_every_block():
    rows = measure(llama(), [])
    none, some, more = (errors(allocate(rows, sparsity)) for sparsity in (0.0, 0.3, 0.6))
    assert none == [0.0] * 3
    assert all(0 < a < b for a, b in zip(some, more, strict=True))


def test_the_error_of_a_removed_first_block_is_passed_on():
    plan = allocate(measure(llama(), []), 0.0)
    removed = {name: Spec(1.0) for name in plan.weights if name.startswith("model.layers.0.")}
    found = errors(replace(plan, weights=plan.weights | removed))
    model = llama()
    with torch.no_grad():
        hidden = [model(row[None], output_hidden_states=True).hidden_states for row in TOKENS["input_ids"]]
    # A block without weights adds nothing: its output is its input, here the embeddings.
    before, after = (torch.cat([states[k] for states in hidden]) for k in (0, 1))
    assert found[0] == pytest.approx(float((before - after).square().sum() / after.square().sum()), rel=1e-5)
    assert min(found) > 0
