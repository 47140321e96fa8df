"""What the choice of types is made from is the same with one block in memory as with the whole model."""

import pytest
import tiny
import torch
from command import contents

from billhook.errors import Interrupted
from billhook.measurement import level_errors as module
from billhook.steps import request as requests
from billhook.steps import saved_levels
from billhook.steps.compress_units import compress
from billhook.steps.inputs import ModelRequest
from billhook.steps.levels import measure_levels
from billhook.steps.request import in_memory, open_request
from billhook.steps.saved_levels import SavedLevels, resume_advice
from billhook.steps.unfinished_folder import ended_early

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))


def test_a_streamed_model_gives_the_same_errors_costs_and_losses_as_one_in_memory(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=3), dtype=torch.bfloat16, words=False)
    request = ModelRequest(source, calibration=IDS, batch_size=4)
    streamed = open_request(request, True, "This", streamed=True)
    whole = in_memory(streamed, request)
    assert streamed.resources.streamed
    assert not whole.resources.streamed
    outside = {"model.embed_tokens.weight": ["q8_0", "q5_0", "iq4_nl"]}
    menus = {layer.name: ["q8_0", "q4_0"] for layer in whole.layers}
    found = [
        measure_levels(opened, menus, outside, torch.float16, SavedLevels(None, {})) for opened in (streamed, whole)
    ]
    assert found[0] == found[1]
    assert all(types["q4_0"] > types["q8_0"] > 0 for types in found[0].errors.values())
    assert all(cost > 0 for cost in found[0].costs.values())
    (losses,) = found[0].losses.values()
    assert losses["iq4_nl"] > losses["q5_0"] > losses["q8_0"] > 0
    embedding = streamed.model.get_input_embeddings().weight
    assert torch.equal(embedding, whole.model.get_input_embeddings().weight)  # restored


def test_a_type_that_ruins_the_embeddings_does_not_change_what_larger_types_are_said_to_lose(tmp_path):
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=False)
    model.get_output_embeddings().weight.data *= 10
    request = ModelRequest(tiny.save(tmp_path / "model", model, words=False), calibration=IDS, batch_size=4)
    opened = open_request(request, True, "This", streamed=False)
    menus = {layer.name: ["q8_0"] for layer in opened.layers}
    types = ["q8_0", "q5_0", "iq4_nl", "int2/32"]
    found = [
        measure_levels(opened, menus, {"lm_head.weight": menu}, torch.float16, SavedLevels(None, {})).losses
        for menu in (types, types[:-1])
    ]
    with_smallest, without = (losses["lm_head.weight"] for losses in found)
    assert with_smallest.pop("int2/32") > 0.1
    assert with_smallest == without


@pytest.mark.parametrize("same", [True, False])
def test_levels_of_another_version_of_the_package_are_measured_again(tmp_path, monkeypatch, same):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2), dtype=torch.bfloat16, words=False)
    fields = {"size": "60KB", "target": "transformers", "calibration": IDS, "batch_size": 4, "sweeps": 0}
    measured: list[int] = []
    original = module._measure
    monkeypatch.setattr(module, "_measure", lambda *given: measured.append(1) or original(*given))

    def stop(line: str) -> None:
        if len(measured) == 5:  # of 8 groups of layers with one input, 4 in a block
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        compress(source, tmp_path / "out", progress=stop, **fields)
    measured.clear()
    monkeypatch.setattr(requests, "VERSION", requests.VERSION if same else "0.0.1")
    compress(source, tmp_path / "out", **fields)
    assert len(measured) == (4 if same else 8)


@pytest.mark.parametrize(
    "after", [pytest.param(2, marks=pytest.mark.nightly), 12, pytest.param(20, marks=pytest.mark.nightly)]
)
def test_a_choice_that_is_killed_goes_on_with_what_was_measured_and_gives_the_same_bytes(tmp_path, monkeypatch, after):
    """Killed in the first block, in the second one, and in the backward pass."""
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2), dtype=torch.bfloat16, words=False)
    fields = {"size": "60KB", "target": "transformers", "calibration": IDS, "batch_size": 4, "sweeps": 0}
    done: list[str] = []

    def progress(line: str) -> None:
        done.append(line)
        if len(done) > after:
            raise KeyboardInterrupt

    kept = tmp_path / "out.partial" / "billhook.levels.json"
    with pytest.raises((KeyboardInterrupt, Interrupted)) as stopped:
        compress(source, tmp_path / "out", progress=progress, **fields)
    assert kept.exists() == (after > 7) == isinstance(stopped.value, Interrupted)
    assert str(stopped.value) == (
        f"Stopped. What is finished is kept in {kept}: the same command measures the rest." if after > 7 else ""
    )
    measured: list[list[str]] = []
    original = module._measure
    monkeypatch.setattr(module, "_measure", lambda layers, *rest: measured.append(layers) or original(layers, *rest))
    compress(source, tmp_path / "out", **fields)
    assert len(measured) == {2: 8, 12: 4, 20: 0}[after]  # groups of layers with one input
    monkeypatch.undo()
    compress(source, tmp_path / "whole", **fields)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_measurements_of_another_run_or_version_and_damaged_ones_are_not_used(tmp_path, monkeypatch):
    SavedLevels(tmp_path / "x.partial", {"seed": 0}).keep(information={"layer": 1.0})
    assert SavedLevels(tmp_path / "x.partial", {"seed": 0}).found.information == {"layer": 1.0}
    assert SavedLevels(tmp_path / "x.partial", {"seed": 1}).found.information == {}
    monkeypatch.setattr(saved_levels, "VERSION", saved_levels.VERSION + 1)
    assert SavedLevels(tmp_path / "x.partial", {"seed": 0}).found.information == {}
    (tmp_path / "x.partial" / "billhook.levels.json").write_text('{"identity": {"seed": 0}, "errors": 3}')
    assert SavedLevels(tmp_path / "x.partial", {"seed": 0}).found.errors == {}
    SavedLevels(tmp_path / "x.partial", {}).forget()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError(), Interrupted("Stopped. The disk cannot be read.")]
)
def test_a_stop_is_known_by_its_kind_and_not_by_the_words_of_its_message(tmp_path, error):
    """What only holds these words is raised as it is."""
    ended = ended_early(error, 0, tmp_path / "out", f"Block 1 is finished and kept in {tmp_path}")
    with pytest.raises(Interrupted) as raised, resume_advice(tmp_path, "start it again"):
        raise ended
    stopped = isinstance(error, KeyboardInterrupt)
    assert raised.value.stopped == ended.stopped == stopped
    assert (raised.value is ended) != stopped
    assert str(raised.value).endswith(
        "start it again." if stopped else "continue with the same command and resume=True."
    )
