"""Tasks: which class opens a model, how a source becomes batches, and an encoder through the whole tool."""

import json

import bert
import pytest
import tiny
import torch
from command import done
from transformers import AutoModelForMaskedLM

from billhook import BillhookError, load_model, prune, verify
from billhook.engine.walk import walk
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.scoring import IGNORED
from billhook.steps.evaluate import EvalConfig, evaluate_model
from billhook.store.checkpoint import load_tokenizer
from billhook.tasks import TASKS
from billhook.tasks.base import Drawing, Home
from billhook.tasks.opening import task_of, task_of_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    bert.save(folder / "model")
    tiny.text_file(folder / "text.txt", 60)
    return folder


@pytest.mark.parametrize("name", ["text-generation", "fill-mask"])
def test_every_task_of_tokens_keeps_the_contract(name):
    task = TASKS.get(name)
    assert task.name == name
    model = {"text-generation": tiny.llama, "fill-mask": bert.model}[name]()
    assert task_of(model) is task
    batch = task.batch(torch.arange(24).view(2, 12))
    with torch.no_grad():
        logits, labels = task.scored(model(**batch).logits, batch | {"labels": batch["input_ids"]})
    assert logits.shape[:2] == labels.shape
    assert task.loss(model, batch | {"labels": batch["input_ids"]}).ndim == 0
    assert isinstance(task.protocol, str)


def test_a_model_of_no_task_is_refused_by_name(tmp_path):
    with pytest.raises(BillhookError, match=r"DetrForObjectDetection: only models for image-text-to-text, .*fill-mask"):
        task_of_config(tmp_path, {"architectures": ["DetrForObjectDetection"], "model_type": "detr"})
    with pytest.raises(BillhookError, match="BartModel"):
        task_of_config(tmp_path, {"architectures": ["BartModel"], "model_type": "bart", "is_encoder_decoder": True})


def test_masked_positions_are_chosen_once_and_only_they_are_labels(place):
    model = load_model(place / "model")
    task = task_of(model)
    drawn = task.samples(str(place / "text.txt"), model, Home(place / "model"), Drawing(samples=20, length=32))
    again = task.samples(str(place / "text.txt"), model, Home(place / "model"), Drawing(samples=20, length=32))
    ids, labels = drawn.batch["input_ids"], drawn.batch["labels"]
    assert torch.equal(ids, again.batch["input_ids"])
    tokenizer = load_tokenizer(place / "model")
    masked = labels != IGNORED
    assert torch.equal(ids == tokenizer.mask_token_id, masked)
    assert 0.10 < float(masked.float().mean()) < 0.20
    assert set(ids[:, 0].tolist()) == {tokenizer.cls_token_id}
    assert set(ids[:, -1].tolist()) == {tokenizer.sep_token_id}
    assert not (torch.isin(labels, torch.tensor(tokenizer.all_special_ids)) & masked).any()


def test_the_walk_of_an_encoder_is_exact(place):
    model = load_model(place / "model")
    batch = task_of(model).samples(str(place / "text.txt"), model, Home(place / "model"), Drawing(4, 16)).batch
    seen = []
    hooks = [
        b.register_forward_pre_hook(
            lambda _, args, kw: seen.append((args[0] if args else kw["hidden_states"]).clone()), with_kwargs=True
        )
        for b in model.bert.encoder.layer
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    inputs = [block.inputs[0].clone() for block in walk(model, [batch], ("gram",), read_only=True)]
    assert len(inputs) == len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(inputs, seen, strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "magnitude"},
        {"criterion": "wanda", "allocator": "owl"},
        {"criterion": "sparsegpt", "pattern": "2:4", "sparsity": None},
        {"criterion": "gblm", "allocator": "alphapruning"},
        {"criterion": "admm", "refine": "blocks", "samples": 12},
    ],
    ids=lambda fields: fields["criterion"],
)
def test_an_encoder_is_pruned_saved_verified_and_opened_by_transformers(place, tmp_path, fields):
    text = {"calibration": place / "text.txt", "samples": 6, "length": 32}
    report = prune(
        place / "model", output=tmp_path / "pruned", **({"sparsity": 0.5, "criterion": "wanda"} | text | fields)
    )
    assert abs(report.sparsity - 0.5) < 1e-3
    assert verify(report.output).ok
    stock = AutoModelForMaskedLM.from_pretrained(report.output)
    weight = stock.bert.encoder.layer[0].attention.self.query.weight
    assert (weight == 0).any()
    ids = torch.arange(10, 30)[None]
    assert torch.equal(stock(ids).logits, load_model(report.output)(ids).logits)


def test_an_interrupted_run_on_an_encoder_gives_the_same_bytes(place, tmp_path):
    from resuming import whole_and_in_parts

    fields = {"sparsity": 0.5, "criterion": "sparsegpt", "calibration": place / "text.txt", "samples": 6, "length": 32}
    one, other = whole_and_in_parts(place / "model", tmp_path, 1, **fields)
    assert one == other


def test_masked_tokens_are_scored(place, tmp_path):
    model, record = load_model(place / "model"), None
    record = evaluate_model(
        place / "model", EvalConfig(data=str(place / "text.txt"), length=32, against=str(place / "model"))
    )
    assert "masked tokens" in record["protocol"]
    assert record["against"]["kl"] == 0
    assert record["against"]["top1_agreement"] == 1
    windows, scoring = task_of(model).evaluation(str(place / "text.txt"), load_tokenizer(place / "model"), model, 32)
    batch = scoring.batch(windows.ids)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    masked = batch["labels"] != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[masked], batch["labels"][masked])
    found = evaluate(model, windows, scoring=scoring)
    assert found.tokens == int(masked.sum()) == record["tokens"]
    assert found.nll == pytest.approx(float(expected), rel=1e-5)


def test_all_commands_work_on_an_encoder(place, tmp_path):
    text = ("--calibration", place / "text.txt", "--samples", 6, "--length", 32)
    done("prune", place / "model", "--sparsity", 0.5, "--criterion", "wanda", *text, "-o", tmp_path / "out")
    done("verify", tmp_path / "out")
    ran = done("eval", tmp_path / "out", "--data", place / "text.txt", "--length", 32, "--json")
    assert "masked tokens" in ran.json["protocol"]
    assert json.loads((tmp_path / "out" / "billhook.json").read_text())
