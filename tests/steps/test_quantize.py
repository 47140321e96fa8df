"""Quantizing a directory: what stock programs read is what was computed, and interrupted runs give the same bytes."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import families
import gguf
import pytest
import tiny
import torch
from command import billhook, contents, done
from quantized_layers import tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from billhook import prune
from billhook.architectures.layers import find_layers
from billhook.engine.loop import apply_plan_
from billhook.engine.method import Quantization
from billhook.errors import BillhookError, Interrupted
from billhook.export.compressed_tensors import read
from billhook.methods.quantize import QUANTIZERS
from billhook.methods.quantize.grids import grid_of
from billhook.methods.statistics import LayerStats
from billhook.packed.loading import load
from billhook.plan.plan import Budget, Plan
from billhook.plan.spec import Spec
from billhook.steps.export import export_dense
from billhook.steps.quantize import QuantizeRequest, prepare, quantize, run
from billhook.steps.types import uniform_plan
from billhook.steps.verify import verify
from billhook.steps.verify_gguf import examine_gguf
from billhook.store.gguf_file import read_gguf
from billhook.store.record import history
from billhook.store.shards import read_shard, weight_files

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
GPTQ = {"calibration": IDS, "batch_size": 2, "sweeps": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=3, intermediate_size=48)
    return tiny.save(tmp_path_factory.mktemp("source") / "model", model, dtype=torch.bfloat16, words=False)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    return quantize(source, "int4/16", tmp_path_factory.mktemp("whole") / "out", **GPTQ).output


def stop_after(source: Path, output: Path, blocks: int) -> None:
    """Start the run of `whole`, and end it after so many blocks."""
    left = [blocks]

    def stopping() -> bool:
        left[0] -= 1
        return left[0] == 0

    options = {"sweeps": GPTQ["sweeps"]}
    job = prepare(QuantizeRequest(source, "int4/16", output, calibration=IDS, batch_size=2, options=options))
    with pytest.raises(Interrupted, match=f"{blocks} of 3 blocks are finished"):
        run(job, stopping=stopping)


@pytest.mark.parametrize(
    ("type", "dtype"),
    [
        pytest.param(type, dtype, marks=() if type == "int4/32" or dtype == torch.bfloat16 else pytest.mark.nightly)
        for type in ("int2/16", "int3/16", "int4/32", "int8/16")
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
    ],
)
def test_stock_transformers_opens_the_directory_with_the_decoded_weights(tmp_path, type, dtype):
    model = tiny.llama(num_hidden_layers=2, intermediate_size=64)
    source = tiny.save(tmp_path / "model", model, dtype=dtype, words=False)
    output = quantize(source, type, tmp_path / "out", quantizer="round").output
    shards = [read_shard(path) for path in weight_files(output)]
    stock = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
    stock(IDS)  # decodes the weights
    found, before = stock.state_dict(), tensors(source)
    layers = json.loads((output / "billhook.json").read_text())["layers"]
    assert len(layers) == 14
    for name in layers:
        decoded = read(f"{name}.weight", grid_of(type), shards).decode(dtype)
        assert torch.equal(found[f"{name}.weight"], decoded)
        assert not torch.equal(decoded, before[f"{name}.weight"])
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(found[name], before[name])
    assert verify(output).ok
    assert torch.equal(load(output, dtype=dtype)(IDS).logits, stock(IDS).logits)


def test_a_layer_whose_columns_do_not_divide_gets_a_smaller_group_which_is_noted(tmp_path, source):
    report = quantize(source, "int4", tmp_path / "out", quantizer="round")
    assert {r.type for r in report.layers} == {"int4/32", "int4/16"}
    assert "are stored as int4/32" in report.warnings[0]


def test_the_report_counts_bits_and_bytes(whole, source, tmp_path):
    report = quantize(source, "int4/16", tmp_path / "out", quantizer="round")
    bytes_of = [sum(path.stat().st_size for path in weight_files(folder)) for folder in (tmp_path / "out", source)]
    assert (report.size, report.source_size) == tuple(bytes_of)
    assert report.bits == 5.0  # 4, and a scale of 16 for 16 columns
    assert len(report.layers) == 21


def test_either_a_type_or_a_plan_of_types_of_one_kind_is_given(tmp_path, source):
    names = [f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")]
    fields = {"targets": "re:.*layers.0.mlp.(gate|up)_proj", "quantizer": "round"}
    for types, type, match in [
        (("int4/16", "int4/16"), "int4/16", "Give either a storage type"),
        (("int4/16", "q4_0"), "", "mixes GGUF types with types intB/GROUP"),
        (("q4_0", "int4/16"), "", "mixes GGUF types with types intB/GROUP"),
    ]:
        plan = Plan(Budget("bytes", 2000), {name: Spec(type=t) for name, t in zip(names, types, strict=True)})
        with pytest.raises(BillhookError, match=match):
            quantize(source, type, tmp_path / "out", plan=plan, **fields)
    with pytest.raises(BillhookError, match="Give either a storage type"):
        quantize(source, "", tmp_path / "out", **fields)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blocks", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, source, whole, blocks):
    stop_after(source, tmp_path / "out", blocks)
    changes = (
        {"type": "int3/16"},
        {"quantizer": "round", "sweeps": ...},
        {"damping": 0.5},
        {"calibration": IDS.flip(0)},
    )
    for change in changes if blocks == 1 else changes[:1]:
        fields = {key: value for key, value in ({"type": "int4/16"} | GPTQ | change).items() if value is not ...}
        with pytest.raises(BillhookError, match="cannot be continued"):
            quantize(source, output=tmp_path / "out", resume=True, **fields)
    quantize(source, "int4/16", tmp_path / "out", resume=True, **GPTQ)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_stopped_run_goes_on_only_with_the_same_type_of_embeddings(tmp_path, source):
    fields = {"quantizer": "round", "ignore": "re:.*down_proj"}
    job = prepare(QuantizeRequest(source, "q8_0", tmp_path / "out", embeddings="q8_0", **fields))
    with pytest.raises(Interrupted):
        run(job, stopping=lambda: True)
    with pytest.raises(BillhookError, match="cannot be continued"):
        quantize(source, "q8_0", tmp_path / "out", embeddings="q4_0", resume=True, **fields)
    quantize(source, "q8_0", tmp_path / "out", embeddings="q8_0", resume=True, **fields)
    assert read_gguf(tmp_path / "out" / "out.gguf").tensors["token_embd.weight"].type == "q8_0"


def test_a_damaged_block_is_found_when_the_run_is_resumed_and_made_again(tmp_path, source, whole):
    stop_after(source, tmp_path / "out", 2)
    file = tmp_path / "out.partial" / "model-00003-of-00004.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    quantize(source, "int4/16", tmp_path / "out", resume=True, **GPTQ)
    assert contents(tmp_path / "out") == contents(whole)


def test_verify_finds_a_changed_scale_and_a_changed_code(tmp_path, whole):
    for part in ("weight_packed", "weight_scale"):
        folder = tmp_path / part
        shutil.copytree(whole, folder)
        path = folder / "model-00002-of-00004.safetensors"
        shard = read_shard(path)
        entry = next(entry for name, entry in shard.entries.items() if name.endswith(part))
        data = bytearray(path.read_bytes())
        data[entry.start] ^= 0x11
        path.write_bytes(data)
        assert any("SHA-256" in problem for problem in verify(folder).problems)


def test_zeros_of_a_pruned_model_stay_and_both_steps_are_recorded_and_verified(tmp_path, source):
    pruned = prune(source, output=tmp_path / "pruned", sparsity=0.5, criterion="magnitude", calibration=None).output
    output = quantize(pruned, "int4/16", tmp_path / "out", **GPTQ).output
    before, shards = tensors(pruned), [read_shard(path) for path in weight_files(output)]
    record = json.loads((output / "billhook.json").read_text())
    for name in record["layers"]:
        codes = read(f"{name}.weight", grid_of("int4/16"), shards).codes
        assert not codes[before[f"{name}.weight"] == 0].any()
    assert [step["step"] for step in record["steps"]] == ["prune", "quantize"]
    assert verify(output).ok


@pytest.mark.parametrize("type", ["iq4_nl", "q4_1", "q4_0", "int4/16"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_zero_is_kept_where_the_type_has_one_and_counted_where_it_is_not(tmp_path, type, pattern):
    """The record of a run whose type has no zero says which zeros were lost, so that its decoded weights verify."""
    pruning = {"sparsity": 0.5, "pattern": pattern, "criterion": "magnitude", "calibration": None}
    model = tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=1), dtype=torch.float16)
    pruned = prune(model, output=tmp_path / "pruned", **pruning).output
    report = quantize(pruned, type, tmp_path / "out", quantizer="round")
    before, after = tensors(pruned), tensors(export_dense(report.output, tmp_path / "dense").path)
    names = [f"{layer.layer}.weight" for layer in report.layers]
    lost = sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in names)
    assert (lost == 0) == grid_of(type).has_zero
    assert [w for w in report.warnings if "that were zero" in w] == [
        w for w in report.warnings if w.startswith(f"{lost:,} weights that were zero have values again, in ")
    ]
    assert any("that were zero" in w for w in report.warnings) == (lost > 0)
    for folder in (pruned, report.output, tmp_path / "dense"):
        assert verify(folder).problems == []


def test_pruned_layers_that_a_gguf_file_leaves_as_they_are_are_verified(tmp_path, source):
    pruning = {"sparsity": 0.5, "criterion": "magnitude", "calibration": None}
    pruned = prune(source, output=tmp_path / "pruned", **pruning).output
    output = quantize(pruned, "q8_0", tmp_path / "out", quantizer="round", ignore="re:.*down_proj").output
    assert read_gguf(output / "out.gguf").metadata["billhook.steps"].value == "prune, quantize"
    dense = export_dense(output, tmp_path / "dense").path
    for folder in (pruned, output, dense):
        assert verify(folder).problems == []
        for name, facts in history(pruned).layers.items():
            if name.endswith("down_proj"):
                assert history(folder).layers[name]["zeros"] == facts["zeros"] > 0


def test_a_gguf_file_beside_the_weights_of_a_directory_is_reported_where_it_could_be_taken_for_them(tmp_path, source):
    pruned = prune(source, output=tmp_path / "pruned", sparsity=0.5, criterion="magnitude", calibration=None).output
    output = quantize(source, "q8_0", tmp_path / "out", quantizer="round", ignore="re:.*down_proj").output
    for folder in (pruned, output):
        shutil.copyfile(output / "out.gguf", folder / "a.gguf")
    assert verify(pruned).problems == []
    assert verify(output).problems == ["a.gguf holds weights and is not listed in billhook.json."]


def test_rows_whose_scales_are_too_small_for_the_type_are_noted(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[3], weight[4] = weight[3] * 1e-8, 0
    report = quantize(tiny.save(tmp_path / "model", model), "q8_0", tmp_path / "out", quantizer="round")
    (noted,) = (result for result in report.layers if result.notes)
    assert noted.layer.endswith("up_proj")
    assert noted.notes[0].startswith("1 rows became zero, as their scales are too small for q8_0")


def test_zeros_that_are_lost_after_quantizing_are_still_found(tmp_path, source):
    pruning = {"sparsity": 0.5, "criterion": "magnitude", "calibration": None}
    pruned = prune(source, output=tmp_path / "pruned", **pruning).output
    report = quantize(pruned, "int4/16", tmp_path / "out", quantizer="round")
    dense = export_dense(report.output, tmp_path / "dense").path
    path = dense / "billhook.json"
    record = json.loads(path.read_text())
    name = report.layers[0].layer
    record["layers"][name]["zeros"] = 5
    path.write_text(json.dumps(record))
    shards = tensors(dense)
    shards[f"{name}.weight"][:] = 1
    save_file(shards, next(iter(weight_files(dense))), metadata={"format": "pt"})
    assert any("planned in step 1 (prune)" in problem for problem in verify(dense).problems)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"type": "int9"}, "Unknown storage type"),
        ({"type": "int4/0"}, "Unknown storage type"),
        ({"type": "Q4_K_M"}, "q4_k_m is no type but a mix of several: use q4_k for all layers, or"),
        ({"type": "iq2_m"}, "iq2_m is no type but a mix of several: use iq2_s for all layers, or"),
        ({"type": "f16"}, "cannot quantize to f16"),
        ({"quantizer": "gpt"}, "Unknown quantizer 'gpt'. Did you mean 'gptq'"),
        ({"calibration": None}, "Quantizing with gptq needs activations"),
        ({"sweeps": -1}, "sweeps=-1 at least 0"),
        ({"ignore": "nothing"}, "matches no prunable layer"),
        ({"ignore": "re:.*_head$"}, r"^ignore=r're:\.\*_head\$' matches no prunable layer"),
        ({"embeddings": "q4_0"}, r"cannot be q4_0 beside layers of int4/16"),
        ({"type": "q4_0", "embeddings": "int4"}, "cannot be int4 beside layers of q4_0"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_written(tmp_path, source, change, match):
    fields = {"type": "int4/16", **GPTQ} | change
    with pytest.raises(BillhookError, match=match):
        quantize(source, output=tmp_path / "out", **fields)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ({"weights": {"model.layers.0.mlp.up": "int4/16"}}, "The plan is not for this model"),
        ({"weights": {"model.layers.0.mlp.up_proj": 0.5}}, "The plan has a sparsity"),
        ({"units": {"layers.0.mlp:channels": 8}}, "The plan has no storage types"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused_before_anything_is_written(tmp_path, source, plan, match):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 2, "budget": {"bytes": 1000}, **plan}))
    with pytest.raises(BillhookError, match=match):
        quantize(source, "", tmp_path / "out", plan=path, **GPTQ)
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_without_layers_to_quantize_keeps_its_bytes(tmp_path, source):
    output = quantize(source, "int4/16", tmp_path / "out", ignore="re:.*layers.1.*", **GPTQ).output
    found, before = tensors(output), tensors(source)
    kept = [name for name in before if ".layers.1." in name]
    assert kept
    assert all(torch.equal(found[name], before[name]) for name in kept)
    assert verify(output).ok


def test_a_model_without_a_form_in_gguf_files_is_refused_before_it_is_quantized(tmp_path):
    source = tiny.save(tmp_path / "model", families.build("cohere"), words=False)
    with pytest.raises(BillhookError, match="cohere"):
        prepare(QuantizeRequest(source, "q4_0", tmp_path / "out", quantizer="round", ignore="re:.*down_proj"))


def test_a_width_that_no_group_divides_is_refused_by_name(tmp_path):
    source = tiny.save(tmp_path / "model", tiny.llama(intermediate_size=44), words=False)
    with pytest.raises(BillhookError, match=r"layers.0.mlp.down_proj: a layer with 44 columns cannot be .*ignore="):
        quantize(source, "int4", tmp_path / "out", quantizer="round")


@pytest.mark.parametrize("layers", [2, 5])
def test_all_layers_that_do_not_fit_are_named_at_once(tmp_path, layers):
    model = tiny.llama(intermediate_size=44, num_hidden_layers=layers)
    source = tiny.save(tmp_path / "model", model, words=False)
    run = ("quantize", source, "--type", "int4", "--quantizer", "round", "-o", tmp_path / "out")
    advice = billhook(*run).err.partition("does not fit: ")[2].removesuffix(".\n")
    done(*run, *shlex.split(advice))
    narrow = tiny.save(tmp_path / "narrow", tiny.llama(hidden_size=40, intermediate_size=44), words=False)
    with pytest.raises(BillhookError, match=r"40 columns cannot be stored as q4_0\. No layer fits"):
        quantize(narrow, "q4_0", tmp_path / "other", quantizer="round")


@pytest.mark.parametrize(("family", "what"), [("mixtral", "an expert"), ("gpt2", r"stored as \[in, out\]")])
def test_what_transformers_does_not_read_quantized_is_refused_by_name(tmp_path, family, what):
    source = tiny.save(tmp_path / "model", families.build(family), words=False)
    with pytest.raises(BillhookError, match=rf"\.0.* is {what}, which transformers does not read.*use a GGUF type"):
        quantize(source, "int4/16", tmp_path / "out", quantizer="round")


@pytest.mark.parametrize("type", ["q4_k", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("q4_0", "q8_0"))])
def test_a_gguf_file_holds_what_the_quantizer_computed_in_memory(tmp_path, source, type):
    """Types of 256 columns are replaced by the smallest of 32 with as many bits, embeddings are q8_0 here."""
    fields = {"quantizer": "gptq", "calibration": IDS, "batch_size": 2}
    output = quantize(source, type, tmp_path / "out", ignore="re:.*down_proj", **fields).output
    model, used = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), {"q4_k": "iq4_nl"}.get(type, type)
    layers = [layer for layer in find_layers(model) if "down_proj" not in layer.name]
    plan, _ = uniform_plan(type, layers)
    assert {spec.type for spec in plan.weights.values()} == {used}
    method = Quantization("gptq", QUANTIZERS.configure("gptq", {}))
    embedded = model.get_input_embeddings().weight.data
    embedded.copy_(QUANTIZERS.get("round")(embedded, LayerStats(0, 0), grid_of("q8_0")).decode(torch.float32))
    apply_plan_(model, plan, method, [{"input_ids": part} for part in IDS.split(2)], layers=layers)
    found = load(output / "out.gguf").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value), name
    kinds = {entry.type for entry in read_gguf(output / "out.gguf").tensors.values()}
    assert kinds == {used, "q8_0", "f32", "bf16"}
    assert not list(output.glob("*.safetensors"))
    with pytest.raises(BillhookError, match=r"out\.gguf is a file: verify its directory"):
        verify(output / "out.gguf")
    assert verify(output).ok
    record, name = history(output), "model.layers.0.self_attn.q_proj"
    assert record is not None
    digest = read_gguf(output / "out.gguf").metadata["billhook.source.digest"].value
    assert digest == record.steps[-1].model["digest"]
    for change, message in [
        ({"zeros": record.layers[name]["zeros"] + 1}, "zeros in its layers"),
        ({"zeros": record.layers[name]["zeros"] - 1}, "zeros in its layers"),
        ({"type": "q5_1"}, "layers of the types"),
    ]:
        layers = {**record.layers, name: {**record.layers[name], **change}}
        *_, problems = examine_gguf(output / "out.gguf", replace(record, layers=layers), lambda name: None)
        assert len(problems) == 1
        assert message in problems[0]
    entry = read_gguf(output / "out.gguf").tensors["blk.1.attn_q.weight"]
    data = bytearray((output / "out.gguf").read_bytes())
    data[entry.start : entry.start + 2] = b"\x00\x7e"  # NaN in float16
    (output / "out.gguf").write_bytes(data)
    problems = verify(output).problems
    assert any("SHA-256" in problem for problem in problems)
    assert any("attn_q.weight holds NaN" in problem for problem in problems)


def test_the_model_card_names_the_types_and_no_local_path(whole, tmp_path):
    text = (whole / "README.md").read_text()
    assert "| int4/16 | 5.00 | 21 |" in text
    assert "compressed-tensors" in text
    assert str(whole.parent) not in text
    assert "held-out" in text or "calibration windows" in text


def test_report_writes_the_card_of_a_quantized_directory_again(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    before = (whole / "README.md").read_bytes()
    for _ in range(2):
        done("report", tmp_path / "copy")
        assert (tmp_path / "copy" / "README.md").read_bytes() == before
        (tmp_path / "copy" / "README.md").unlink()
    assert not (tmp_path / "copy" / "report.json").exists()
    assert billhook("report", tmp_path / "copy", "--speed", "bench.json").code == 2


def test_a_split_gguf_file_is_verified_and_opened_like_a_whole_one(tmp_path, source):
    fields = {"quantizer": "round", "ignore": "re:.*down_proj"}
    whole = quantize(source, "q4_0", tmp_path / "whole", **fields).output
    report = quantize(source, "q4_0", tmp_path / "parts", split_size="10KB", **fields)
    parts = sorted(report.output.glob("*.gguf"))
    assert len(parts) > 2
    assert report.size == sum(path.stat().st_size for path in parts)
    assert verify(report.output).ok
    expected = load(whole / "whole.gguf").state_dict()
    for given in (parts[1], export_dense(report.output, tmp_path / "dense", kind="f32").path):
        found = load(given).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(BillhookError, match="split files are for GGUF files"):
        quantize(source, "int4/16", tmp_path / "out", split_size="10KB", **fields)


def test_a_template_gives_the_names_of_an_architecture_that_is_not_known(tmp_path):
    """Any names will do: rows are found by their values."""
    source = tiny.save(tmp_path / "model", families.build("cohere"), words=False)
    writer = gguf.GGUFWriter(tmp_path / "f32.gguf", "command-r")
    stored = {f"t.{name}".replace("t.model.embed_tokens", "token_embd"): x for name, x in tensors(source).items()}
    for name in sorted(stored, reverse=True):
        writer.add_tensor(name, stored[name].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = {"quantizer": "round", "ignore": "re:.*down_proj", "template": tmp_path / "f32.gguf"}
    output = quantize(source, "q8_0", tmp_path / "out", **fields).output
    assert verify(output).ok
    file = read_gguf(output / "out.gguf")
    for name, entry in file.tensors.items():
        value = stored[name].float()
        if entry.type == "q8_0":
            value = QUANTIZERS.get("round")(value, LayerStats(0, 0), grid_of("q8_0")).decode(torch.float32)
        assert torch.equal(torch.from_numpy(file.values(entry)), value), name
    assert sum(entry.type == "q8_0" for entry in file.tensors.values()) > 10
