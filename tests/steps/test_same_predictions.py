"""The check that written files compute what the model in memory computes."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from billhook.engine.streaming import open_streamed
from billhook.errors import JobError
from billhook.steps.inputs import ModelRequest
from billhook.steps.request import Opened, draw_text, open_model
from billhook.steps.same_predictions import check_same_predictions

pytestmark = pytest.mark.gate
IDS = torch.randint(2, 96, (4, 16), generator=torch.Generator().manual_seed(0))


def small(folder: Path, channel: float | None = None) -> Opened:
    """A model in which the first channel of the hidden states may be huge."""
    model = tiny.llama(num_hidden_layers=6)
    if channel is not None:
        model.model.embed_tokens.weight.data[:, 0] = channel
    source = tiny.save(folder / "model", model, words=False)
    request = ModelRequest(source, calibration=IDS)
    return draw_text(open_model(request, streamed=False), request)


def written(opened: Opened, folder: Path, change) -> object:
    """The model with the change, as stock `transformers` opens it."""
    model = AutoModelForCausalLM.from_pretrained(opened.source, dtype=torch.float32)
    change(model)
    model.save_pretrained(folder)
    return open_streamed(folder, "AutoModelForCausalLM", dtype=torch.float32, device="cpu").model


@torch.no_grad()
def noisy(model) -> None:
    """Rounding errors, about as large as those of other kernels in all layers."""
    torch.manual_seed(0)
    for parameter in model.model.layers.parameters():
        parameter *= 1 + 1e-4 * torch.randn_like(parameter)


@torch.no_grad()
def without_a_head(model) -> None:
    model.model.layers[4].self_attn.o_proj.weight[:, :8] = 0


def other_angles(model) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 10.0}


@pytest.mark.parametrize("channel", [None, 3000])
def test_rounding_is_no_difference(tmp_path, channel):
    opened = small(tmp_path, channel)
    check_same_predictions(opened, written(opened, tmp_path / "same", lambda model: None), range(6))
    check_same_predictions(opened, written(opened, tmp_path / "noisy", noisy), range(6))


@pytest.mark.parametrize("change", [without_a_head, other_angles])
def test_another_shape_is_refused(tmp_path, change):
    opened = small(tmp_path)
    with pytest.raises(JobError, match="llama models cannot have this shape"):
        check_same_predictions(opened, written(opened, tmp_path / "changed", change), range(6))
