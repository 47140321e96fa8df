"""Gradient checkpointing in evaluation mode: every block is computed twice, and gradients are the same."""

import pytest
import tiny
import torch

from billhook.errors import BillhookError
from billhook.recovery.recomputing import recomputing

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("wanted", [False, True])
def test_blocks_are_computed_again_and_gradients_are_the_same(wanted):
    model, calls = tiny.llama(num_hidden_layers=2), []
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.model.layers:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with recomputing(model, wanted):
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert len(calls) == (4 if wanted else 2)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    assert not any(module.training for module in model.modules())


def test_a_model_without_it_is_refused():
    model = tiny.llama(num_hidden_layers=2)
    model.supports_gradient_checkpointing = False
    with pytest.raises(BillhookError, match="LlamaForCausalLM has no gradient checkpointing"), recomputing(model):
        pass
