"""Adapters in a training run: merged with every zero in place, or an ordinary adapter's directory."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from command import contents
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import billhook
from billhook import BillhookError, load_model, prune, recover, verify
from billhook.errors import Interrupted
from billhook.recovery import training
from billhook.steps.recover import RecoverRequest, prepare, run

pytestmark = pytest.mark.gate
FEW = {"tune": "adapters", "length": 32, "tokens": 6 * 128, "batch_size": 4, "rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and a model pruned in float32 and bfloat16."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny.text_file(folder / "text.txt", 60)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        tiny.save(folder / f"dense-{name}", tiny.llama(num_hidden_layers=2), dtype=dtype)
        about = {"sparsity": 0.6, "criterion": "magnitude", "allocator": "uniform"}
        prune(folder / f"dense-{name}", output=folder / name, **about)
    return folder


def fields(place: Path, **changes) -> dict:
    return {"calibration": str(place / "text.txt"), **FEW, **changes}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_adapters_keep_every_zero_and_help(place: Path, tmp_path: Path, dtype: str) -> None:
    report = recover(place / dtype, tmp_path / "out", **fields(place, rank=4))
    assert report.improved
    assert verify(tmp_path / "out").ok
    before, after = weights(place / dtype), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 14
    assert all("proj" in name and not after[name][before[name] == 0].any() for name in changed)
    (note,) = (note for note in report.warnings if "ordinary merge" in note)
    lost, zeros = (int(word.replace(",", "")) for word in note.split() if word[0].isdigit())
    assert zeros == report.zeros == sum(int((before[name] == 0).sum()) for name in changed)
    assert lost > 0.9 * zeros
    made_by = json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"][-1]["made_by"]
    assert (made_by["tune"], made_by["rank"]) == ("adapters", 4)
    assert made_by["lost"]["kl"] < made_by["lost_before"]["kl"]


def test_a_saved_adapter_is_that_of_the_merged_run(place: Path, tmp_path: Path) -> None:
    recover(place / "float32", tmp_path / "merged", **fields(place))
    recover(place / "float32", tmp_path / "adapter", **fields(place, save="adapter"))
    for reads in (verify, load_model):
        with pytest.raises(
            BillhookError, match=r"holds an adapter of float32, not a whole model.*billhook\.merge_masked"
        ):
            reads(tmp_path / "adapter")
    written = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert written == ["adapter_config.json", "adapter_model.safetensors", "billhook.json"]
    assert str(tmp_path) not in "".join(
        (tmp_path / "adapter" / name).read_text(encoding="utf-8") for name in (written[0], written[2])
    )
    config = billhook.masked_lora(LoraConfig.from_pretrained(tmp_path / "adapter"))
    assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    pruned = AutoModelForCausalLM.from_pretrained(place / "float32")
    merged = billhook.merge_masked(PeftModel.from_pretrained(pruned, tmp_path / "adapter", config=config))
    assert all(torch.equal(merged.get_parameter(n), w) for n, w in weights(tmp_path / "merged").items())


def test_beside_quantized_weights_an_adapter_is_an_ordinary_one(place: Path, tmp_path: Path) -> None:
    """Any program that reads both has the outputs that the run had; merged they cannot be."""
    dense = place / "dense-float32"
    billhook.quantize(dense, "int2/16", tmp_path / "int2", quantizer="round")
    about = fields(place, teacher=dense)
    with pytest.raises(BillhookError, match=r"cannot be merged into .*int2, which is quantized: use save adapter"):
        recover(tmp_path / "int2", tmp_path / "out", **about)
    report = recover(tmp_path / "int2", tmp_path / "out", **about, save="adapter")
    ids, teacher = torch.arange(60, 100)[None], AutoModelForCausalLM.from_pretrained(dense)
    decoded = CompressedTensorsConfig(run_compressed=False)  # as the message says
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "int2", quantization_config=decoded, dtype=torch.float32)
    with torch.no_grad():
        before = (alone(ids).logits - teacher(ids).logits).norm()
        both = PeftModel.from_pretrained(alone, tmp_path / "out")
        assert (both(ids).logits - teacher(ids).logits).norm() < before
    assert report.improved
    with pytest.raises(BillhookError, match=r"holds an adapter of int2.*load them decoded.*run_compressed=False"):
        verify(tmp_path / "out")
    layer = both.base_model.model.model.layers[0].mlp.up_proj
    assert layer.get_delta_weight("default")[layer.base_layer.weight == 0].any()


@pytest.mark.nightly
def test_a_stopped_run_goes_on_to_the_same_bytes(place: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(training, "MEASURED", (2, 2))
    monkeypatch.setattr("billhook.steps.recover_setup.RATES", (0.003, 0.01))
    about = fields(place, rate=None)
    whole = recover(place / "bfloat16", tmp_path / "whole", teacher=place / "dense-bfloat16", **about)
    request = RecoverRequest(
        model=place / "bfloat16", output=tmp_path / "out", teacher=place / "dense-bfloat16", **about
    )
    with pytest.raises(Interrupted, match="The run is at step 2 of 6"):
        run(prepare(request), stopping=lambda: True)
    again = {**about, "teacher": place / "dense-bfloat16", "resume": True}
    with pytest.raises(BillhookError, match="cannot be continued: its rank was None"):
        recover(place / "bfloat16", tmp_path / "out", rank=3, **again)
    recover(place / "bfloat16", tmp_path / "out", **again)
    assert contents(tmp_path / "out") == contents(whole.output)


def test_where_nothing_improves_the_input_comes_back(place: Path, tmp_path: Path) -> None:
    report = recover(place / "bfloat16", tmp_path / "out", **fields(place, rate=100.0))
    assert not report.improved
    assert not any("ordinary merge" in note for note in report.warnings)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (place / "bfloat16" / name).read_bytes()


def test_a_published_recipe_trains_query_and_value_in_one_pass(place: Path, tmp_path: Path) -> None:
    """With two windows through the model at a time, which add up to a step of 16."""
    request = RecoverRequest(
        model=place / "float32",
        output=tmp_path / "out",
        calibration=str(place / "text.txt"),
        recipe="alphapruning-lora",
        length=32,
        batch_size=16,
    )
    assert (request.tune, request.rank, request.objective, request.rate) == ("adapters", 8, "text", 1e-4)
    job = prepare(request)
    windows = len(job.setup.batch["input_ids"])
    assert job.setup.steps == windows // 16
    assert [job.setup.falling(step) for step in (0, 4)] == [0.2, 1.0]
    run(job)
    before, after = weights(place / "float32"), weights(tmp_path / "out")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "v_proj"}


def test_parts_of_a_step_add_up(place: Path, tmp_path: Path, monkeypatch) -> None:
    found = []
    for together in (2048, 32):
        monkeypatch.setattr("billhook.steps.recover_setup.TOGETHER", together)
        about = fields(place, objective="kl", tokens=128)
        recover(place / "float32", tmp_path / str(together), **about)
        found.append(weights(tmp_path / str(together)))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])
    assert any(not torch.equal(found[0][name], weights(place / "float32")[name]) for name in found[0])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tune": "kept", "rank": 4}, "A rank and save are for adapters"),
        ({"rank": 0}, "The rank must be at least 1, got 0"),
        ({"save": "both"}, "save='both' must be one of merged, adapter"),
        ({"recipe": "alphapruning-lara"}, "Unknown recipe 'alphapruning-lara'. Did you mean 'alphapruning-lora'"),
        ({"targets": "nothing"}, "nothing matches no prunable layer"),
    ],
    ids=str,
)
def test_a_mistake_is_one_message(place: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        recover(place / "float32", tmp_path / "out", **fields(place, **changes))
    assert not list(tmp_path.iterdir())
