"""`--recipe best` of quantizing: scales, norms and biases are tuned, codes stay, and the files hold what was tuned."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from command import billhook, contents, done
from quantized_layers import tensors
from transformers import AutoModelForCausalLM

from billhook.demo import MODEL
from billhook.errors import BillhookError, Interrupted
from billhook.export import compressed_tensors
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest
from billhook.methods.statistics import LayerStats
from billhook.recovery.trained import Scaled
from billhook.steps.quantize import QuantizeRequest, prepare, quantize, run
from billhook.steps.verify import verify
from billhook.store.shards import read_shard, weight_files

TEXT = {"samples": 16, "length": 32, "batch_size": 8, "sweeps": 0}
NORM = "model.layers.0.post_attention_layernorm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The first two blocks of the bundled model: a random one has nothing that tuning could learn."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16, num_hidden_layers=2)
    folder = tmp_path_factory.mktemp("source") / "model"
    model.save_pretrained(folder)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(shutil.__file__).read_text())
    return {"calibration": path, **TEXT}


@pytest.mark.parametrize("type", ["int3/16", "q4_1", "q2_k", "iq4_xs", "q6_k", "iq2_xs"])
def test_the_gradient_by_the_scales_is_that_of_the_decoded_weight(type: str) -> None:
    generator = torch.Generator().manual_seed(0)
    W, gradient = (torch.randn(3, 256, generator=generator, dtype=torch.float32) for _ in range(2))
    made = nearest(W, LayerStats(0, 0), grid_of(type))
    parameter = torch.nn.Parameter(made.decode(torch.float32))
    scaled = Scaled("w", parameter, made)
    start, found = scaled.values().clone(), scaled.gradient(gradient)
    assert torch.equal(scaled.weight.decode(torch.float32), made.decode(torch.float32))
    for index in range(0, len(start), max(1, len(start) // 7)):
        values = []
        for step in (-0.5, 0.5):  # the weight is linear in each number
            moved = start.clone()
            moved[index] += step
            scaled.restore_(moved)
            values.append(float((parameter.detach().double() * gradient).sum()))
        assert values[1] - values[0] == pytest.approx(float(found[index]), rel=1e-3, abs=1e-3)


@pytest.mark.gate
def test_codes_stay_while_scales_and_norms_move_and_stock_transformers_reads_them(tmp_path, source, text) -> None:
    good, best = (quantize(source, "int2/32", tmp_path / r, recipe=r, **text).output for r in ("good", "best"))
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (
        compressed_tensors.read(name, grid_of("int2/32"), [read_shard(p) for p in weight_files(folder)])
        for folder in (good, best)
    )
    assert torch.equal(before.codes, after.codes)
    assert not torch.equal(before.scales.scale, after.scales.scale)
    assert torch.equal(tensors(good)[NORM], tensors(source)[NORM])
    assert not torch.equal(tensors(best)[NORM], tensors(source)[NORM])
    stock = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    stock(torch.arange(8)[None])
    assert torch.equal(stock.get_parameter(name), after.decode(torch.float32))
    assert torch.equal(stock.get_parameter(NORM), tensors(best)[NORM].float())
    assert verify(best).ok


@pytest.mark.nightly
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, source, text) -> None:
    whole = quantize(source, "int2/32", tmp_path / "whole", recipe="best", **text).output
    request = {"model": source, "type": "int2/32", "output": tmp_path / "part", "recipe": "best", **text}
    with pytest.raises(Interrupted, match="1 of 2 blocks"):
        run(prepare(QuantizeRequest.given(**request)), stopping=lambda: True)
    with pytest.raises(BillhookError, match="recipe"):
        prepare(QuantizeRequest.given(**request | {"recipe": "good", "resume": True}))
    resumed = run(prepare(QuantizeRequest.given(resume=True, **request))).output
    assert contents(resumed) == contents(whole)


@pytest.mark.nightly
def test_a_gguf_file_holds_the_tuned_norms(tmp_path, source, text) -> None:
    report = quantize(source, "mxfp4", tmp_path / "out", recipe="best", **text)  # whose scales are powers of two
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(report.output / "out.gguf").tensors}
    norms = torch.from_numpy(found["blk.0.ffn_norm.weight"].copy())
    assert not torch.equal(norms, tensors(source)[NORM].float())
    assert torch.equal(norms, norms.bfloat16().float())  # as the model directory would store them
    assert verify(report.output).ok


def test_tuning_needs_text(tmp_path, source) -> None:
    command = ("quantize", source, "--type", "int2/32", "--recipe", "best", "--quantizer", "round")
    ran = billhook(*command, "-o", tmp_path / "out")
    assert ran.code == 2
    assert "The recipe best" in ran.err
    ran = billhook(*command, "--imatrix", source / "config.json", "-o", tmp_path / "out")
    assert ran.code == 2
    assert "give one of the two" in ran.err


@pytest.mark.nightly
def test_a_dry_run_measures_the_tuning_and_leaves_no_trace(tmp_path, source, text) -> None:
    options = ("--calibration", text["calibration"], "--samples", 16, "--length", 32, "--set", "sweeps=0", "--json")
    seconds = {}
    for recipe in ("good", "best"):
        command = ("quantize", source, "--type", "int2/32", "--recipe", recipe, "-o", tmp_path / "out", "--dry-run")
        seconds[recipe] = done(*command, *options).json["estimate"]["seconds"]
    assert seconds["best"] > 2 * seconds["good"]
    assert not (tmp_path / "out").exists()
