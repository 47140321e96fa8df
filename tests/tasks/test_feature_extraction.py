"""Encoders without a head: embeddings, their cosine to the dense ones, and a whole run."""

import json

import bert
import pytest
import tiny
import torch
import vision_families
from transformers import AutoModel, BertModel

from billhook import BillhookError, load_model, prune, verify
from billhook.engine.batch import select_rows
from billhook.evaluation.quality import Reference
from billhook.steps.evaluate import EvalConfig, evaluate_model
from billhook.tasks.base import Drawing, Home
from billhook.tasks.opening import task_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedding")
    masked = bert.model()
    encoder = BertModel(masked.config).eval()
    encoder.load_state_dict(masked.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder / "bert")
    bert.tokenizer().save_pretrained(folder / "bert")
    tiny.text_file(folder / "text.txt", 60)
    lines = [json.dumps({"text": f"sentence number {n}" + " more" * n}) for n in range(6)]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.gate
def test_a_sentence_encoder_is_pruned_and_scored_by_the_cosine_of_its_mean_embeddings(place):
    text = str(place / "text.txt")
    found = prune(
        place / "bert", sparsity=0.5, criterion="sparsegpt", calibration=text, samples=12, length=32,
        output=place / "out",
    )  # fmt: skip
    assert verify(place / "out").ok
    assert found.lost.cosine > 0.5
    assert found.lost.kl is None
    record = evaluate_model(place / "out", EvalConfig(str(place / "lines.jsonl"), against=str(place / "bert")))
    dense, pruned = AutoModel.from_pretrained(place / "bert"), AutoModel.from_pretrained(place / "out")
    tokenizer, cosines = bert.tokenizer(), []
    for line in (place / "lines.jsonl").read_text().splitlines():
        inputs = tokenizer(json.loads(line)["text"], truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            ours, theirs = (model.eval()(**inputs).last_hidden_state.mean(1) for model in (pruned, dense))
        cosines.append(float(torch.nn.functional.cosine_similarity(ours, theirs)))
    assert record["inputs"] == 6
    assert record["against"]["cosine"] == pytest.approx(sum(cosines) / 6, abs=1e-5)
    assert "feature-extraction" in (place / "out" / "README.md").read_text()
    assert f"cosine distance</span><b>{1 - found.lost.cosine:.3f}" in (place / "out" / "report.html").read_text()


@pytest.mark.gate
def test_auto_chooses_by_the_cosine_on_held_out_images():
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = vision_families.encoder()
    task = task_of(model)
    assert task.name == "feature-extraction"
    batch = task.samples(images, model, Home(), Drawing()).batch
    reference = Reference.of(model, select_rows(batch, slice(0, 8)), task, "x")
    with torch.no_grad():
        expected = model(pixel_values=images[:8]).pooler_output
        torch.testing.assert_close(task.scored(expected, batch)[0][:, 0], expected)
    assert reference.compare(model).cosine == pytest.approx(1)
    found = prune(model, sparsity=0.6, recipe="good", calibration=images)
    racing = found.plan.made_by["racing"]
    assert racing["tried"][racing["best"]] <= racing["tried"]["uniform"]
    assert reference.compare(model).cosine < 1
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(model(pixel_values=images[:8]).pooler_output, expected).mean()
    assert reference.compare(model).cosine == pytest.approx(float(cosine), abs=1e-5)


def test_gradients_need_a_head(place):
    with pytest.raises(BillhookError, match="without a head has no loss"):
        prune(vision_families.encoder(), sparsity=0.5, recipe="gblm", calibration=torch.zeros(4, 3, 32, 32))
    assert task_of(load_model(place / "bert")).name == "feature-extraction"
    assert task_of(tiny.llama().model).name == "feature-extraction"
