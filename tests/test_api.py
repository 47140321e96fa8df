"""What an engineer tries first in Python: models in memory, tensors of token ids, and the pieces by themselves."""

import copy
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

import billhook
from billhook import BillhookError
from billhook.steps.facts import model_facts

IDS = torch.randint(0, 256, (5, 32), generator=torch.Generator().manual_seed(0))
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model():
    return tiny.llama(num_hidden_layers=2)


def test_prune_changes_a_model_in_place(model):
    assert not model.name_or_path
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    report = billhook.prune(model, sparsity=0.5, criterion="wanda", calibration=IDS)
    assert report.sparsity == 0.5
    assert report.output is None
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert report.to_json()["layers"][Q]["zeros"] == 512
    assert report.record["steps"][0]["made_by"]["calibration"]["source"] == "given as a tensor"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_built_in_memory_is_saved_and_loads(model, tmp_path):
    report = billhook.prune(model, sparsity=0.5, criterion="wanda", calibration=IDS, output=tmp_path / "pruned")
    assert report.output == tmp_path / "pruned"
    assert billhook.verify(tmp_path / "pruned").ok
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_loaded_model_finds_its_tokenizer(tmp_path):
    tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2))
    tiny.text_file(tmp_path / "text.txt")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    by_object = billhook.prune(
        loaded, sparsity=0.5, criterion="wanda", calibration=tmp_path / "text.txt", samples=4, length=32
    )
    by_path = billhook.prune(
        tmp_path / "model",
        sparsity=0.5,
        criterion="wanda",
        calibration=str(tmp_path / "text.txt"),
        samples=4,
        length=32,
    )
    digests = {report.record["steps"][0]["made_by"]["calibration"]["digest"] for report in (by_object, by_path)}
    assert len(digests) == 1


def test_measure_allocate_prune_and_evaluate_work_one_by_one(model):
    table = billhook.measure(model, ["alpha_peak", "outlier_ratio:5"], batches=IDS.split(2))
    assert {"alpha_peak", "outlier_ratio:5"} <= set(table.columns())
    plan = billhook.allocate(table, 0.6, allocator="alphapruning", epsilon=0.2)
    before = billhook.evaluate(model, IDS)
    results = billhook.prune_(model, plan, criterion="sparsegpt", batches=IDS.split(2), damping=0.02)
    assert sum(r.zeros for r in results) == round(0.6 * table.total)
    assert billhook.evaluate(model, IDS).token_ppl != before.token_ppl
    assert before.source == "given as a tensor"
    assert before.bits_per_byte is None


def test_one_tensor_is_one_batch(model):
    assert (
        billhook.measure(model, "outlier_ratio:5", batches=IDS).rows
        == billhook.measure(model, ["outlier_ratio:5"], batches=[IDS]).rows
    )
    table = billhook.measure(model)
    results = billhook.prune_(model, billhook.allocate(table, 0.5), batches=IDS)
    assert {result.sparsity for result in results} == {0.5}


def test_plans_and_tables_may_be_objects_or_files(model, tmp_path):
    table = billhook.measure(model)
    plan = billhook.allocate(table, 0.5, allocator="alphapruning")
    table.save(tmp_path / "table.json")
    plan.save(tmp_path / "plan.json")
    assert billhook.load_plan(tmp_path / "plan.json") == plan
    assert billhook.Table.load(tmp_path / "table.json") == table
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert billhook.prune(tiny.llama(num_hidden_layers=2), plan=given, criterion="magnitude").plan == plan
    for given in (table, tmp_path / "table.json"):
        fields = {"table": given, "sparsity": 0.5, "allocator": "alphapruning", "criterion": "magnitude"}
        assert billhook.prune(tiny.llama(num_hidden_layers=2), **fields).plan.sparsity == plan.sparsity


def test_options_of_methods_are_keywords(model):
    fields = {"sparsity": 0.5, "allocator": "alphapruning", "criterion": "magnitude"}
    spread = [
        max(billhook.prune(tiny.llama(num_hidden_layers=2), **fields, **options).plan.sparsity.values())
        for options in ({"epsilon": 0.1}, {"options": {"epsilon": 0.1}}, {"epsilon": 0.3})
    ]
    assert spread[0] == spread[1] < spread[2]
    with pytest.raises(BillhookError, match=r"has an option 'sparsty'\. Did you mean 'sparsity'\?"):
        billhook.prune(model, allocator="alphapruning", sparsty=0.5)


def test_one_target_may_be_given_as_a_string(model):
    report = billhook.prune(model, sparsity=0.5, criterion="magnitude", targets="re:.*q_proj", ignore="model.layers.1")
    assert [layer.layer for layer in report.layers] == [Q]
    assert report.record["steps"][0]["made_by"]["targets"] == ["re:.*q_proj"]


def test_magnitude_needs_no_text(model):
    assert (
        billhook.prune(model, sparsity=0.5, criterion="magnitude").record["steps"][0]["made_by"]["calibration"] is None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_half_precision_models_keep_their_dtype(model, dtype, criterion):
    assert billhook.prune(
        model.to(dtype), sparsity=0.5, criterion=criterion, calibration=IDS
    ).sparsity == pytest.approx(0.5, abs=1e-3)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_model_in_training_mode_stays_in_it(model):
    assert billhook.prune(model.train(), sparsity=0.5, criterion="wanda", calibration=IDS).sparsity == 0.5
    assert model.training


@pytest.mark.parametrize("criterion", ["wanda", "gblm"])
def test_dropout_takes_no_part(model, criterion):
    model.config.attention_dropout = 0.5
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    twin = copy.deepcopy(model)
    billhook.prune(model.eval(), sparsity=0.5, criterion=criterion, calibration=IDS)
    billhook.prune(twin.train(), sparsity=0.5, criterion=criterion, calibration=IDS)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(module.training for module in twin.modules())


def test_a_decoder_without_a_head_is_pruned(model):
    assert billhook.prune(model.model, sparsity=0.5, criterion="wanda", calibration=IDS).sparsity == 0.5


def test_a_report_is_short_as_text_and_whole_as_a_data_frame_and_in_a_notebook(model, monkeypatch):
    report = billhook.prune(model, sparsity=0.5, criterion="wanda", calibration=IDS)
    assert re.fullmatch(r"Report: 50\.00% of 18,432 weights removed, in memory; [a-z ]+: KL divergence .*", str(report))
    assert len(repr(report)) < 400
    frame = report.to_dataframe()
    assert list(frame["layer"]) == [layer.layer for layer in report.layers]
    assert frame["zeros"].sum() == 18432 // 2
    assert report._repr_html_().count("<tr>") == 1 + len(frame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BillhookError, match="needs pandas: pip install pandas"):
        report.to_dataframe()


def test_progress_is_reported(model):
    seen: list[str] = []
    billhook.prune(model, sparsity=0.5, criterion="wanda", calibration=IDS, progress=seen.append)
    assert len(seen) == 14


@pytest.mark.parametrize(
    "ids, message",
    [
        (IDS[0], r"must be \[samples, length\] with length 2 or more, found \[32\]"),
        (IDS[None], r"found \[1, 5, 32\]"),
        (IDS[:0], r"found \[0, 32\]"),
        (IDS[:, :1], r"found \[5, 1\]"),
        (IDS.float(), "must be whole numbers, found torch.float32"),
        (IDS[0].tolist(), "found int"),
        ({"input_ids": IDS}, "found dict"),
        (IDS + 1000, r"token id \d+ at row 0, position 0 is outside the vocabulary of 258"),
        (IDS.repeat(1, 9), "Windows of 288 tokens exceed the model's context of 128"),
    ],
    ids=lambda value: "" if not isinstance(value, str) else value[:20],
)
def test_calibration_that_cannot_be_used_is_refused(model, ids, message):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BillhookError, match=message):
        billhook.prune(model, sparsity=0.5, criterion="wanda", calibration=ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_that_cannot_be_used_are_refused(model):
    plan = billhook.allocate(billhook.measure(model), 0.5)
    for batches in (IDS[0], [IDS.float()], [IDS + 1000], list(IDS)):
        with pytest.raises(BillhookError, match="batches: "):
            billhook.prune_(model, plan, batches=batches)
        with pytest.raises(BillhookError, match="batches: "):
            billhook.measure(model, ["outlier_ratio:5"], batches=batches)
    with pytest.raises(BillhookError, match="activations: give text"):
        billhook.prune_(model, plan)
    with pytest.raises(BillhookError, match="activations: give text"):
        billhook.measure(model, ["outlier_ratio:5"])
    with pytest.raises(BillhookError, match=r"windows: `tokens` must be"):
        billhook.evaluate(model, IDS[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "Say how much to remove"),
        ({"sparsity": "0.5"}, "sparsity='0.5' must be a number or None"),
        ({"sparsity": 0.5, "group": "column"}, "group='column' must be one of row, layer"),
        ({"sparsity": 0.5, "rounding": "floor"}, "use published=True"),
        ({"sparsity": 0.5, "sampling": "papers"}, "use published=True"),
        ({"sparsity": 0.5, "batch_size": 0}, "The batch size must be at least 1, got 0"),
        ({"sparsity": 0.5, "calibration": "text.txt"}, "no tokenizer to read text.txt"),
        ({"sparsity": 0.5, "calibration": None}, "activations"),
        ({"sparsity": 0.5, "criterion": "wnda"}, "Did you mean 'wanda'"),
    ],
    ids=str,
)
def test_impossible_fields_of_a_request_are_refused(model, fields, message):
    with pytest.raises(BillhookError, match=message):
        billhook.prune(model, **({"calibration": IDS, "criterion": "wanda"} | fields))


@pytest.mark.parametrize("thing", [3, None, torch.nn.Linear(2, 2), {}])
def test_things_that_are_no_model_are_refused(thing):
    with pytest.raises(BillhookError, match=r"must be a .*transformers PreTrainedModel, got"):
        billhook.prune(thing, sparsity=0.5, criterion="magnitude")


def test_a_model_from_the_hub_is_recorded_by_its_name(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--some-model" / "snapshots" / "0a1b2c"
    cached.mkdir(parents=True)
    tiny.save(cached)
    assert model_facts(cached, tiny.llama())["name"] == "owner/some-model"
