"""What the choice of types is made from is the same with one block in memory as with the whole model."""

import pytest
import tiny
import torch

from billhook.steps.levels import measure_levels
from billhook.steps.request import Request, in_memory, open_request

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))


def test_a_streamed_model_gives_the_same_errors_costs_and_losses_as_one_in_memory(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=3), dtype=torch.bfloat16, words=False)
    request = Request(source, calibration=IDS, batch_size=4)
    streamed = open_request(request, True, "This", streamed=True)
    whole = in_memory(streamed, request)
    assert streamed.resources.streamed
    assert not whole.resources.streamed
    outside = {"model.embed_tokens.weight": ["q8_0", "q5_0", "iq4_nl"]}
    menus = {layer.name: ["q8_0", "q4_0"] for layer in whole.layers}
    found = [measure_levels(opened, menus, outside, torch.float16, 0) for opened in (streamed, whole)]
    assert found[0] == found[1]
    assert all(types["q4_0"] > types["q8_0"] > 0 for types in found[0].errors.values())
    assert all(cost > 0 for cost in found[0].costs.values())
    (losses,) = found[0].losses.values()
    assert losses["iq4_nl"] > losses["q5_0"] > losses["q8_0"] > 0
    embedding = streamed.model.get_input_embeddings().weight
    assert torch.equal(embedding, whole.model.get_input_embeddings().weight)  # restored
