"""Decoders without a head, such as embedding models that were trained from a Llama: compared by their embeddings."""

import json

import pytest
import tiny
import torch

import billhook
from billhook import BillhookError
from billhook.plan.front import measured_levels
from billhook.steps.export import export_gguf

IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Three blocks, of which the second changes nothing."""
    folder = tmp_path_factory.mktemp("headless")
    model = tiny.llama(tie_word_embeddings=False).model
    with torch.no_grad():
        for weight in (model.layers[1].self_attn.o_proj.weight, model.layers[1].mlp.down_proj.weight):
            weight.zero_()
    tiny.text_file(folder / "text.txt", 20)
    return tiny.save(folder / "model", model)


@pytest.mark.gate
def test_the_block_that_changes_no_embedding_goes_first(source, tmp_path):
    text = {"calibration": source.parent / "text.txt", "samples": 4, "length": 32}
    report = billhook.slim(source, 0.3, tmp_path / "out", units="blocks", **text)
    assert report.dropped == [1]
    assert report.loss.cosine == pytest.approx(1, abs=1e-4)


def levels(folder):
    made = json.loads((folder / "billhook.json").read_text())["steps"][-1]
    return measured_levels(billhook.Plan.from_json(made["plan"], str(folder)))


@pytest.mark.gate
def test_what_embeddings_lose_in_few_bits_is_measured(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=1, intermediate_size=32).model, words=False)
    billhook.compress(source, tmp_path / "out", bits=8, calibration=IDS, sweeps=0, types=("q4_0", "q8_0"))
    assert max(x.error for x in levels(tmp_path / "out")["embed_tokens.weight"].types.values()) < 1


@pytest.mark.nightly
def test_units_and_bits_are_compared_by_the_embeddings(source, tmp_path):
    fields = {"calibration": IDS, "sweeps": 0, "types": ("q4_0", "q8_0"), "units": "blocks"}
    report = billhook.compress(source, tmp_path / "out", bits=6, **fields)
    assert all(0 <= loss < 1 for loss in report.measured.values())


@pytest.mark.gate
def test_what_needs_predictions_is_refused_with_the_reason(source, tmp_path):
    jobs = [
        lambda: billhook.prune(source, sparsity=0.5, criterion="gblm", calibration=IDS, output=tmp_path / "out"),
        lambda: billhook.slim(source, 0.2, tmp_path / "out", units="channels", method="taylor", calibration=IDS),
    ]
    for job in jobs:
        with pytest.raises(BillhookError, match="without a head has no loss"):
            job()
    assert not list(tmp_path.iterdir())
    with pytest.raises(BillhookError, match="self: is text that the model writes"):
        billhook.prune(source, sparsity=0.5, calibration="self:", output=tmp_path / "other")


def test_it_is_exported_without_a_head(source, tmp_path):
    assert export_gguf(source, tmp_path / "out.gguf").types["f32"] == 7  # the norms
