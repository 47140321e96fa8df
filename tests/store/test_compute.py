"""What `auto` means for device and dtype, said first by every command that computes."""

import pytest
import tiny
import torch
from command import PRUNE, TEXT, done, refused

import billhook
from billhook import BillhookError
from billhook.steps.quantize import quantize
from billhook.store import compute
from billhook.store.compute import chosen_device, chosen_dtype, stored_dtype

RUNS = {
    "prune": PRUNE,
    "dry run": ("prune", "model", "--sparsity", "0.5", "--criterion", "magnitude", "--dry-run"),
    "measure": ("measure", "model", "-o", "new.json"),
    "gradients": ("gradients", "model", "-o", "g.safetensors", *TEXT),
    "eval": ("eval", "model", "--data", "text.txt", "--length", "32", "--limit", "2"),
    "generate": ("generate", "model", "fox", "--max-new-tokens", "2"),
    "compare": ("compare", "model", "--sparsities=0.5", "--criteria=wanda", "--data", "text.txt", "-o", "c", *TEXT),
    "search": ("search", "model", "--sparsity", "0.5", "--allocator", "owl", "--budget", "1", "-o", "s", *TEXT),
}


@pytest.mark.gate
@pytest.mark.parametrize("name", RUNS)
def test_the_first_line_of_a_run_names_device_and_dtype(place, name):
    tiny.save(place / "model", tiny.llama(num_hidden_layers=2), dtype=torch.bfloat16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    computed = "bfloat16" if device == "cuda" else "float32"
    first = done(*RUNS[name]).err.splitlines()[0]
    assert first == f"Computing on {device} in {computed}; the weights of model are bfloat16."


def test_auto_is_the_gpu_and_the_dtype_of_the_files_there_and_float32_on_a_processor(tmp_path, monkeypatch):
    for number, dtype in enumerate([torch.bfloat16, torch.float16, torch.float32, torch.float64]):
        model = tiny.save(tmp_path / str(number), tiny.llama(num_hidden_layers=1), dtype=dtype, words=False)
        assert stored_dtype(model) == dtype
        assert chosen_dtype("auto", "cpu", model) == torch.float32
        assert chosen_dtype("auto", "cuda:1", model) == (torch.float32 if dtype == torch.float64 else dtype)
        assert chosen_dtype("bfloat16", "cpu", model) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == "cpu"


@pytest.mark.parametrize("device", ["cuda:99", "meta", "mps", "gpu", ""])
def test_a_device_without_values_or_that_is_not_here_is_refused(device):
    with pytest.raises(
        BillhookError, match=rf"^Cannot compute on device '{device}': .+\. Use auto, cpu, cuda or cuda:1\.$"
    ):
        chosen_device(device)


@pytest.mark.gate
@pytest.mark.parametrize("name", ["prune", "eval", "generate", "measure"])
def test_commands_refuse_such_a_device_before_anything_else(place, name):
    refused(place, *RUNS[name], "--device", "meta", match="Cannot compute on device 'meta'")
    refused(place, *RUNS[name], "--device", "cuda:99", match="Cannot compute on device 'cuda:99'")


def test_a_model_that_does_not_fit_in_memory_is_scored_one_block_at_a_time(place, monkeypatch):
    run = ("eval", "model", "--data", "text.txt", "--length", "32", "--limit", "4", "--json", "--device", "cpu")
    whole = done(*run)
    monkeypatch.setattr(compute, "free_gib", lambda device: 1e-6)
    monkeypatch.setattr(billhook.steps.evaluate, "load", lambda *_, **__: pytest.fail("loaded as a whole"))
    streamed = done(*run)
    assert "free: they are read one block at a time." in streamed.err
    assert streamed.json["nll"] == whole.json["nll"]


def test_a_quantized_model_that_does_not_fit_when_it_is_decoded_is_refused_with_what_to_do(tmp_path, monkeypatch):
    model = tiny.llama(num_hidden_layers=1)
    source = tiny.save(tmp_path / "model", model, dtype=torch.bfloat16)
    packed = quantize(source, "int2", tmp_path / "packed", quantizer="round").output
    needed = sum(value.numel() for value in model.parameters()) * 4 / 2**30
    monkeypatch.setattr(compute, "free_gib", lambda device: needed / 2)
    for path in (source, packed):
        lacking = compute.lacking_gib(path, torch.float32, "cpu")
        assert lacking == (pytest.approx(needed, rel=0.2), needed / 2)
    text = tiny.text_file(tmp_path / "text.txt")
    refused(tmp_path, "eval", str(packed), "--data", str(text), match="free. Decode them with .* --to dense")
