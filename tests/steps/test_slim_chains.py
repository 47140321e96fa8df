"""A slimmed model goes into every other step: compressed, pruned, packed, exported, also where it is filled up."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from billhook import prune
from billhook.plan.plan import Budget, Plan
from billhook.steps.compress_units import compress
from billhook.steps.export import export_gguf
from billhook.steps.pack import pack
from billhook.steps.quantize import quantize
from billhook.steps.slim import slim
from billhook.steps.verify import verify
from billhook.store.record import read_record

IDS = torch.randint(3, 96, (6, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["alike", "filled up"])
def small(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    model = tiny.llama(num_hidden_layers=2, intermediate_size=64)
    source = tiny.save(folder / "model", model, dtype=torch.bfloat16, words=False)
    counts = {f"model.layers.{i}.mlp:channels": n for i, n in enumerate((32, 32 if request.param == "alike" else 48))}
    return slim(source, None, folder / "out", plan=Plan(Budget("parameters", 1), {}, counts), calibration=IDS).output


@pytest.mark.gate
@torch.no_grad()
def test_a_gguf_file_of_it_has_its_shapes_and_values(tmp_path, small):
    file = export_gguf(small, tmp_path / "small.gguf", kind="f32").path
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    assert again.config.intermediate_size == model.config.intermediate_size
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
def test_it_is_pruned_packed_and_compressed_and_every_result_is_verified(tmp_path, small):
    pruned = prune(small, output=tmp_path / "pruned", sparsity=0.5, recipe="fast", calibration=IDS).output
    assert verify(pruned).ok
    assert verify(pack(pruned, tmp_path / "packed").output).ok
    report = compress(
        small, output=tmp_path / "bits", ratio=0.9, target="vllm", types=("int4/16", "int8/16"), calibration=IDS
    )
    assert verify(report.quantized.output).ok


@pytest.mark.gate
def test_the_cards_of_several_steps_count_all_of_them_and_say_what_the_last_was_compared_with(tmp_path, small):
    again = slim(small, 0.2, tmp_path / "again", units="channels", method="wanda_sp", calibration=IDS).output
    shares = [step.made_by["removed"] for step in read_record(again / "billhook.json").steps]
    card = (again / "README.md").read_text()
    assert f"without {1 - (1 - shares[0]) * (1 - shares[1]):.1%} of the parameters in its blocks" in card
    assert "numbered as before the last removal" in card
    assert "The dense model there is the one before the last of 2 steps: slim, slim." in card
    assert "numbered as in the original" in (small / "README.md").read_text()
    assert "The dense model there" not in (small / "README.md").read_text()
    pruned = prune(small, output=tmp_path / "pruned", sparsity=0.5, recipe="fast", calibration=IDS).output
    card = (pruned / "README.md").read_text()
    assert "the last of 2 steps: slim, prune." in card
    assert "Parts of the blocks were removed" in card


@pytest.mark.gate
def test_every_step_records_the_dtype_and_the_device_that_it_computed_in(tmp_path, small):
    pruned = prune(small, output=tmp_path / "pruned", sparsity=0.5, recipe="fast", calibration=IDS).output
    packed = quantize(pruned, "int8/16", tmp_path / "bits", quantizer="round").output
    made = [step.made_by for step in read_record(packed / "billhook.json").steps]
    assert [(each["dtype"], each["device"]) for each in made] == [("float32", "cpu")] * 3
