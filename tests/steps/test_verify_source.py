"""Kept weights have the bytes of the source in whatever dtype a run computed."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from command import done, refused
from safetensors.torch import load_file, save_file

import billhook
from billhook import prune
from billhook.steps.verify import verify

IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
PAIRS = [
    (torch.float32, "bfloat16", "auto"),
    (torch.float32, "bfloat16", "bfloat16"),
    (torch.float32, "float32", "float16"),
    (torch.float16, "bfloat16", "bfloat16"),
    (torch.bfloat16, "bfloat16", "auto"),
    (torch.bfloat16, "bfloat16", "float16"),
    (torch.float64, "float64", "auto"),
    (torch.float64, "float64", "bfloat16"),
]


def saved(folder: Path, stored: torch.dtype, configured: str, model=None) -> Path:
    """A model whose config.json names another dtype than that of its files."""
    tiny.save(folder, tiny.llama(num_hidden_layers=2) if model is None else model, dtype=stored, words=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": configured}))
    return folder


def kept_bytes(source: Path, output: Path) -> tuple[int, int]:
    """The numbers of nonzero values in the output that have the source's bytes, and that have not."""
    before, after = (load_file(path / "model.safetensors") for path in (source, output))
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    kept = [(after[name] != 0, before[name] == after[name]) for name in before]
    return sum(int((n & same).sum()) for n, same in kept), sum(int((n & ~same).sum()) for n, same in kept)


@pytest.mark.parametrize(
    ("stored", "configured", "computed", "criterion"),
    [
        pytest.param(*pair, criterion, marks=() if criterion == "wanda" or pair == PAIRS[0] else pytest.mark.nightly)
        for pair in PAIRS
        for criterion in ("magnitude", "wanda", "ria")
    ],
    ids=str,
)
def test_a_criterion_that_only_masks_writes_the_sources_bytes_with_zeros(
    stored, configured, computed, criterion, tmp_path
):
    source = saved(tmp_path / "model", stored, configured)
    report = prune(
        source,
        sparsity=0.5,
        criterion=criterion,
        calibration=IDS,
        dtype=computed,
        device="cpu",
        output=tmp_path / "out",
    )
    assert kept_bytes(source, tmp_path / "out")[1] == 0
    zeros = sum(int((v == 0).sum()) for v in load_file(tmp_path / "out" / "model.safetensors").values())
    assert zeros >= sum(layer.n for layer in report.layers) // 2
    assert not any(layer.updated for layer in report.layers)
    assert verify(tmp_path / "out", source=source).ok


def test_experts_that_are_fused_in_memory_keep_the_sources_bytes(tmp_path):
    source = saved(tmp_path / "model", torch.float32, "bfloat16", tiny.mixtral())
    prune(source, sparsity=0.5, criterion="wanda", calibration=IDS, dtype="bfloat16", output=tmp_path / "out")
    assert kept_bytes(source, tmp_path / "out")[1] == 0


def test_a_model_in_memory_as_a_whole_keeps_the_sources_bytes(tmp_path):
    source = saved(tmp_path / "model", torch.float32, "float32")
    prune(
        source,
        sparsity=0.5,
        criterion="wanda",
        calibration=IDS,
        dtype="bfloat16",
        allocator="auto",
        output=tmp_path / "out",
    )
    assert kept_bytes(source, tmp_path / "out")[1] == 0


@pytest.mark.parametrize(("stored", "computed"), [(torch.bfloat16, "float32"), (torch.float64, "float32")], ids=str)
def test_updated_weights_are_written_in_the_dtype_of_the_files_and_the_report_says_so(stored, computed, tmp_path):
    source = saved(tmp_path / "model", stored, "bfloat16")
    report = prune(source, sparsity=0.5, criterion="sparsegpt", calibration=IDS, device="cpu", output=tmp_path / "out")
    assert kept_bytes(source, tmp_path / "out")[1] > 0
    name = str(stored).removeprefix("torch.")
    assert f"computed in {computed} and are stored in {name}" in report.warnings[-1]
    assert verify(tmp_path / "out", source=source).ok


def test_values_that_underflow_in_the_dtype_of_the_computation_stay_where_nothing_is_removed(tmp_path):
    model = tiny.llama(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, :5] = 1e-9
        model.model.embed_tokens.weight[3, 3] = 1e-9
    source = saved(tmp_path / "model", torch.float32, "float32", model)
    sizes = {layer.name: math.prod(layer.shape) for layer in billhook.find_layers(model)}
    sparsity = {name: 0.0 if "up_proj" in name else 0.5 for name in sizes}
    target = sum(sparsity[name] * size for name, size in sizes.items()) / sum(sizes.values())
    plan = billhook.Plan.of_sparsities(target, billhook.Pattern(), sparsity)
    prune(source, plan=plan, criterion="magnitude", dtype="float16", output=tmp_path / "out")
    assert kept_bytes(source, tmp_path / "out")[1] == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert float(after["model.layers.0.mlp.up_proj.weight"][0, 0]) == pytest.approx(1e-9)
    assert float(after["model.embed_tokens.weight"][3, 3]) == pytest.approx(1e-9)


def test_verify_names_a_kept_weight_that_is_not_the_sources(place, tmp_path):
    prune("model", sparsity=0.5, criterion="magnitude", output="pruned")
    done("verify", "pruned", "--source", "model")
    weights = load_file("model/model.safetensors")
    weights["model.embed_tokens.weight"] += 1.0
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    found = verify("pruned", source="model").problems
    assert found == ["model.embed_tokens.weight: kept weights are not those of model, although no step updated them."]
    refused(place, "verify", "pruned", "--source", "nowhere", match="nowhere")
