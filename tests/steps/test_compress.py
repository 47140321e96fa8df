"""Compressing to a size: the file is never larger, and the types are the best for it."""

import json
import re
from pathlib import Path
from typing import Any

import bert
import gguf_families
import pytest
import tiny
import torch
import vision_families
from command import contents, edit
from transformers import AutoModel

from billhook.cli.plot import _front
from billhook.errors import BillhookError, Interrupted
from billhook.export.gguf import write_gguf
from billhook.packed.loading import load
from billhook.plan.bytes import parse_size
from billhook.plan.levels import Levels
from billhook.steps.allocation import _unspent
from billhook.steps.compress import CompressRequest, check, decide, run_compress
from billhook.steps.compress_units import compress
from billhook.steps.like import like_types
from billhook.steps.quantize import quantize
from billhook.steps.sizes import Size, _near, allowed_types
from billhook.steps.types import file_bytes
from billhook.steps.verify import verify
from billhook.store.gguf_file import read_gguf
from billhook.store.shards import read_shard, weight_files

pytestmark = pytest.mark.gate
IDS = torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(0))
FIELDS = {"calibration": IDS, "batch_size": 4, "sweeps": 0}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    model = tiny.llama(num_hidden_layers=2, intermediate_size=64)
    return tiny.save(tmp_path_factory.mktemp("source") / "model", model, dtype=torch.bfloat16, words=False)


LEAST = {"calibration": IDS, "batch_size": 4}


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


@pytest.mark.parametrize("target", ["gguf", pytest.param("transformers", marks=pytest.mark.nightly)])
def test_the_file_is_not_larger_than_asked_and_opens(tmp_path, source, target):
    with pytest.raises(
        BillhookError, match=r"1,000 bytes cannot be met: the least possible .* is ([\d,]+) bytes"
    ) as error:
        compress(source, tmp_path / "out", size=1000, target=target, **FIELDS)
    least = int(str(error.value).partition(" is ")[2].partition(" bytes")[0].replace(",", ""))
    sizes = []
    for number, budget in enumerate((least, least + 3000)):
        report = compress(source, tmp_path / f"out{number}", size=budget, target=target, **FIELDS)
        output = report.quantized.output
        sizes.append(weights(output))
        assert report.quantized.size == sizes[-1] <= budget
        opened = load(output / f"out{number}.gguf" if target == "gguf" else output)
        assert opened(IDS).logits.isfinite().all()
    assert sizes[1] > sizes[0]


@pytest.mark.nightly
def test_the_number_of_steps_of_a_choice_is_known_before_it_begins(tmp_path, source):
    done: list[str] = []
    checked = check(CompressRequest.given(model=source, output=tmp_path / "out", bits=9.0, **FIELDS))
    decide(checked, done.append)
    assert len(done) == checked.steps == 2 * 14 + 1


def test_a_budget_above_all_types_is_spent_on_the_largest(tmp_path, source):
    quantized = compress(source, tmp_path / "out", ratio=1.5, **FIELDS).quantized
    layers = json.loads((quantized.output / "billhook.json").read_text())["layers"].values()
    assert {facts["type"] for facts in layers} == {"q8_0"}
    assert any("smaller than asked, because every tensor has the largest type" in note for note in quantized.warnings)


@pytest.mark.parametrize(
    ("budget", "type", "larger", "why"),
    [
        (3000, "q4_0", 0.01, "the next larger types do not fit"),
        (5000, "q4_0", 0.1, "no larger types were measured to lose less"),
        (5000, "q8_0", 0.01, "every tensor has the largest type that it may have"),
        (4360, "q8_0", 0.01, None),
    ],
)
def test_why_a_file_is_smaller_than_asked_is_said_as_it_is(budget, type, larger, why):
    errors = {"layer": {"q4_0": 0.1, "q8_0": larger}}  # of 2,304 and 4,352 bytes
    levels = Levels({"layer": (64, 64)}, {"layer": ["q4_0", "q8_0"]}, budget, errors=errors)
    notes = _unspent(levels, levels.plan({"layer": type}, {}), 0)
    assert notes == ([] if why is None else [f"The file is smaller than asked, because {why}."])


def test_the_file_of_a_mixture_takes_all_of_the_least_size(tmp_path):
    model = gguf_families.save(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1)
    fields = {"types": ["q4_0"], "calibration": IDS, "sweeps": 0}
    with pytest.raises(BillhookError, match="cannot be met") as error:
        compress(model, tmp_path / "out", size=1000, **fields)
    least = int(str(error.value).partition(" is ")[2].partition(" bytes")[0].replace(",", ""))
    report = compress(model, tmp_path / "out", size=least, **fields)
    assert least - 32 <= report.quantized.size <= least


def test_what_embeddings_take_of_the_budget_leaves_the_small_types_of_layers_to_choose_from():
    """Layers of 1e6 weights at 3 bits, beside embeddings of 4e6 weights at 8.5 bits."""
    types, shapes = allowed_types("gguf", ()), {"layer": (1000, 1024)}
    near = _near({"layer": types}, shapes, 1_024_000 * (3 + 34) // 8, [((4000, 1024), ["q8_0", "q4_k"])])["layer"]
    assert {"q3_k", "q4_k", "q8_0", "iq2_xxs"} <= set(near)


def test_a_type_above_the_mean_always_stays():
    """int4 alone could not spend a mean of 5 bits, and int8 alone is too large."""
    assert _near({"layer": ["int4/64", "int8/64"]}, {"layer": (8, 64)}, 8 * 64 * 5 // 8, []) == {
        "layer": ["int4/64", "int8/64"]
    }


@pytest.mark.parametrize(
    ("target", "sizes", "fields"),
    [
        ("transformers", {"hidden_size": 48, "intermediate_size": 48, "head_dim": 12}, {"types": ["int3/16"]}),
        ("gguf", {}, {"targets": "re:.*gate_proj"}),
    ],
)
def test_rows_that_do_not_fill_words_and_facts_in_a_header_count(tmp_path, target, sizes, fields):
    model = tiny.llama(num_hidden_layers=1, **sizes)
    source = tiny.save(tmp_path / "model", model, dtype=torch.bfloat16, words=False)
    with pytest.raises(BillhookError) as error:
        compress(source, tmp_path / "out", size=1000, target=target, **FIELDS, **fields)
    least = int(str(error.value).partition(" is ")[2].partition(" bytes")[0].replace(",", ""))
    compress(source, tmp_path / "out", size=least, target=target, **FIELDS, **fields)
    assert weights(tmp_path / "out") <= least


@pytest.mark.nightly
def test_a_stopped_run_goes_on_only_with_the_size_and_the_types_it_was_started_with(tmp_path, source, monkeypatch):
    fields = {"size": "60KB", "target": "transformers", **FIELDS}
    whole = compress(source, tmp_path / "whole", **fields).quantized.output

    job = decide(check(CompressRequest.given(model=source, output=tmp_path / "out", **fields)))
    with pytest.raises(Interrupted, match="1 of 2 blocks"):
        run_compress(job, stopping=lambda: True)
    with monkeypatch.context() as patched:
        patched.setattr("billhook.steps.request._draw", lambda *args: pytest.fail("the text was read"))
        changes = ({"size": "40KB"}, {"types": ["int4/16"]}, {"target": "vllm"}, {"seed": 1}, {"sweeps": 1})
        for change in (*changes, {"ignore": "re:.*q_proj"}):
            with pytest.raises(BillhookError, match="cannot be continued"):
                compress(source, tmp_path / "out", resume=True, **{**fields, **change})
    for change in ({"calibration": IDS.flip(0)}, {"batch_size": 2}):
        with pytest.raises(BillhookError, match="cannot be continued"):
            compress(source, tmp_path / "out", resume=True, **{**fields, **change})
    compress(source, tmp_path / "out", resume=True, **fields)
    assert contents(tmp_path / "out") == contents(whole)


def test_a_resumed_run_says_what_other_sizes_would_lose(tmp_path, source):
    fields = {"size": "42KB", "target": "transformers", "types": ["int4/16", "int8/16"], **FIELDS}
    job = decide(check(CompressRequest.given(model=source, output=tmp_path / "out", **fields)))
    with pytest.raises(Interrupted, match="1 of 2 blocks"):
        run_compress(job, stopping=lambda: True)
    assert compress(source, tmp_path / "out", resume=True, **fields).loss_by_size == job.loss_by_size != {}


def test_a_file_and_its_context_fit_in_memory_together(tmp_path, source):
    """Two layers with 2 key-value heads of 8 numbers; 128 tokens are the model's context."""
    report = compress(source, tmp_path / "out", fit=2**27 + 2_000_000, context=100, **FIELDS)
    memory = report.memory
    assert (memory.tokens, memory.cache, memory.program) == (100, 2 * 2 * 256 * 32, 2**27)
    assert report.quantized.size <= report.budget == 2**27 + 2_000_000 - memory.total
    assert report.to_json()["context"]["cache"] == memory.cache
    refused = {
        r"A context of 9,000 tokens exceeds the model's of \d+: use context=\d+ or less": {
            "fit": "1GB",
            "context": 9000,
        },
        r"134,000,000 bytes are not enough: a context of 100 tokens takes [\d,]+ bytes of cache": {"fit": "134MB"},
        r"a context of 100 tokens takes .* for the program\. [\d,]+ bytes cannot be met": {"fit": memory.total + 999},
        r"fit is for llama\.cpp": {"fit": "1GB", "target": "vllm"},
        r"counts only with fit": {"size": "1GB"},
    }
    for match, change in refused.items():
        with pytest.raises(BillhookError, match=match):
            compress(source, tmp_path / "none", **{"context": 100, **change}, **FIELDS)


def test_types_limit_embeddings_too_and_a_plan_applies_to_them_again(tmp_path, source):
    report = compress(source, tmp_path / "out", size="1MB", types=["iq4_nl", "q5_0"], **FIELDS)
    entries = read_gguf(report.quantized.output / "out.gguf").tensors
    assert {entry.type for entry in entries.values() if len(entry.shape) > 1} == {"q5_0"}
    plan = json.loads((report.quantized.output / "billhook.json").read_text())["steps"][-1]["plan"]
    plan["made_by"]["outside"] = {"model.embed_tokens.weight": "q4_0"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    for given, expected in (({}, "q4_0"), ({"embeddings": "q8_0"}, "q8_0")):
        fields = {"plan": tmp_path / "plan.json", "quantizer": "round", "overwrite": True, **given}
        output = quantize(source, "", tmp_path / "again", **fields).output
        assert read_gguf(output / "again.gguf").tensors["token_embd.weight"].type == expected
    for wrong in ({"model.embed_tokens.weight": "int4/64"}, {"lm_head": "q4_0"}, ["q4_0"], {"lm_head": ["q4_0"]}):
        plan["made_by"]["outside"] = wrong
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(BillhookError, match="types for embeddings or head that this model does not have"):
            quantize(source, "", tmp_path / "third", **fields | {"embeddings": ""})


@pytest.mark.parametrize("types", [["q4_0", "q8_0"], ["q4_1", "q5_1"], ["q5_1"], ["mxfp4", "q6_k", "q8_0"]])
def test_more_types_to_choose_from_never_raise_the_least_size(tmp_path, source, types):
    """Embeddings can have every type named that fits and has no code book, as the layers can."""

    def least(some):
        with pytest.raises(BillhookError) as refused:
            check(CompressRequest(source, tmp_path / "out", size=1, types=some, **LEAST))
        return int(re.search(r"with these types is ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))

    assert least(types) == min(least([t]) for t in types if t != "q6_k")


def test_layers_that_vllm_fuses_get_the_same_type(tmp_path, source):
    output = compress(source, tmp_path / "out", size="40KB", target="vllm", **FIELDS).quantized.output
    layers = json.loads((output / "billhook.json").read_text())["layers"]
    types = {name: facts["type"] for name, facts in layers.items()}
    assert {t.partition("/")[0] for t in types.values()} == {"int4", "int8"}
    for block in range(2):
        prefix = f"model.layers.{block}"
        assert len({types[f"{prefix}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert len({types[f"{prefix}.mlp.{x}_proj"] for x in ("gate", "up")}) == 1
    assert verify(output).ok


def test_layers_get_unlike_types_and_more_bytes_are_expected_to_lose_less(tmp_path, source):
    report = compress(source, tmp_path / "out", size="42KB", target="transformers", **FIELDS)
    plan = json.loads((report.quantized.output / "billhook.json").read_text())["steps"][-1]["plan"]
    assert len(set(plan["weights"].values())) > 1
    assert report.loss_by_size[1.1] < 1 < report.loss_by_size.get(0.9, 2)
    drawn = _front(report.quantized.output)["front"]
    assert "one type everywhere" in drawn
    assert "predicted KL divergence, nats a token" in drawn


def test_levels_of_an_earlier_run_lead_to_the_same_file_and_are_refused_where_they_do_not_fit(tmp_path, source):
    first = compress(source, tmp_path / "first", size="42KB", target="transformers", **FIELDS).quantized.output
    fields: dict = {"target": "transformers", "levels": first, **FIELDS}
    compress(source, tmp_path / "again", size="42KB", **fields)
    before, after = ([x.read_bytes() for x in sorted(d.glob("*.safetensors"))] for d in (first, tmp_path / "again"))
    assert before == after != []
    other = tiny.save(tmp_path / "other", tiny.llama(num_hidden_layers=2, seed=1), dtype=torch.bfloat16, words=False)
    for model, change, match in (
        (other, {}, "The levels of .*first are those of another model: model"),
        (source, {"target": "gguf"}, r"first holds no error of .*q8_0.*only of int.*Leave out levels"),
        (source, {"allocator": "alphaq"}, "The allocator alphaq reads no measured levels"),
        (source, {"levels": source}, "holds no measured levels: billhook compress keeps them"),
        (source, {"levels": tmp_path / "nowhere"}, "There is no directory .*nowhere: levels are those of"),
    ):
        with pytest.raises(BillhookError, match=match):
            compress(model, tmp_path / "out", **{"size": "42KB", **fields, **change})
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_types_that_an_earlier_run_did_not_measure_are_left_out_and_named(tmp_path, source):
    fields: dict = {"target": "transformers", **FIELDS}
    first = compress(source, tmp_path / "first", size="42KB", types=["int2", "int3", "int4"], **fields)
    levels = first.quantized.output
    report = compress(source, tmp_path / "out", size="60KB", types=["int2", "int4", "int8"], levels=levels, **fields)
    assert {type.partition("/")[0] for type in report.counts} <= {"int2", "int4"}
    assert any("int8/" in note and "were left out where" in note for note in report.quantized.warnings)
    small = {"types": ["int4", "int8"], **fields}
    first = compress(source, tmp_path / "second", size="60KB", **small).quantized.output
    with pytest.raises(
        BillhookError, match=r"The size cannot be met with what .*second measured. int2.* were left out"
    ):
        compress(source, tmp_path / "third", size="38KB", levels=first, **fields)


@pytest.mark.parametrize(
    ("allocator", "options"),
    [
        ("atp", {"beta": 0.1}),
        *(pytest.param(*x, marks=pytest.mark.nightly) for x in [("uniform", {}), ("alphaq", {}), ("owl", {})]),
        pytest.param("rco", {"steps": 2, "windows": 1}, marks=pytest.mark.nightly),
        pytest.param("auto", {}, marks=pytest.mark.nightly),
    ],
)
def test_every_allocator_meets_the_size_and_says_how(tmp_path, source, allocator, options):
    report = compress(
        source, tmp_path / "out", size="42KB", target="transformers", allocator=allocator, **options, **FIELDS
    )
    assert 40_000 <= report.quantized.size <= 42_000
    step = json.loads((report.quantized.output / "billhook.json").read_text())["steps"][-1]
    made_by = step["plan"]["made_by"]
    assert report.loss_by_size.get(1.1, 1) <= 1 <= report.loss_by_size.get(0.9, 1)
    if allocator == "auto":
        assert {"uniform", "curves", "alphaq"} <= set(made_by["racing"]["tried"])
        assert made_by["racing"]["tried"][made_by["racing"]["best"]] <= made_by["racing"]["tried"]["uniform"]
    else:
        assert made_by["allocator"] == allocator
        assert options.items() <= made_by["options"].items()
    assert made_by["request"]["allocator"] == allocator
    assert step["made_by"]["quantizer_options"]["sweeps"] == 0
    assert ("levels" in made_by) == (allocator in ("rco", "auto"))


@pytest.mark.parametrize("kind", ["text", pytest.param("images", marks=pytest.mark.nightly)])
def test_models_without_predictions_are_compressed_by_the_distance_of_their_embeddings(tmp_path, kind):
    config = (bert.model() if kind == "text" else vision_families.build("vit")).config
    tiny.save(tmp_path / "model", AutoModel.from_config(config), words=False)
    inputs = IDS if kind == "text" else torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fields = FIELDS | {"bits": 17, "target": "transformers", "calibration": inputs}
    report = compress(tmp_path / "model", tmp_path / "out", **fields)
    assert len(report.counts) > 1
    assert report.loss_by_size[1.1] < 1
    assert verify(report.quantized.output).problems == []


@pytest.mark.parametrize(
    ("family", "fields", "match"),
    [
        ("swin", {"target": "transformers"}, r"has several: use --allocator uniform or .*atp"),
        ("vit", {"ignore": "re:.*fc2"}, "No GGUF names are known for vit"),
    ],
)
def test_what_cannot_be_done_for_a_model_of_images_is_said_before_anything_is_measured(tmp_path, family, fields, match):
    tiny.save(tmp_path / "model", vision_families.build(family), words=False)
    given = FIELDS | {"bits": 17, "calibration": torch.zeros(8, 3, 32, 32)} | fields
    request = CompressRequest.given(model=tmp_path / "model", output=tmp_path / "out", **given)
    with pytest.raises(BillhookError) as refused:
        check(request)
    assert re.search(match, refused.value.args[0])


def test_the_types_of_another_file_are_taken_tensor_by_tensor(tmp_path, source):
    first = compress(source, tmp_path / "first", ratio=0.4, **FIELDS).quantized.output
    file, plans = first / "first.gguf", []
    for output in (first, compress(source, tmp_path / "out", allocator=f"like:{file}", **FIELDS).quantized.output):
        plans.append(json.loads((output / "billhook.json").read_text())["steps"][-1]["plan"])
    assert plans[0]["weights"] == plans[1]["weights"]
    assert plans[0]["made_by"]["outside"] == plans[1]["made_by"]["outside"]
    assert plans[1]["made_by"]["allocator"] == plans[1]["made_by"]["request"]["allocator"] == "like:first.gguf"
    assert str(tmp_path) not in json.dumps(plans[1])
    tensors = [read_gguf(x).tensors.values() for x in (file, tmp_path / "out" / "out.gguf")]
    assert [(e.name, e.type, e.shape) for e in tensors[0]] == [(e.name, e.type, e.shape) for e in tensors[1]]
    other = tiny.save(tmp_path / "other", tiny.llama(num_hidden_layers=3), dtype=torch.bfloat16, words=False)
    for model, fields, match in (
        (
            source,
            {"size": weights(first) - 1000},
            r"With the types of .*first.gguf the result has up to [\d,]+ bytes, and",
        ),
        (source, {"target": "transformers"}, "leave out types, and use for gguf"),
        (other, {}, r"first.gguf holds .* as 64x64|first.gguf has no blk.2"),
    ):
        with pytest.raises(BillhookError, match=match):
            compress(model, tmp_path / "again", allocator=f"like:{file}", **fields, **FIELDS)


def test_a_type_of_another_file_that_cannot_be_made_is_named_with_advice_that_helps(tmp_path, source):
    file = write_gguf(source, tmp_path / "file.gguf").path
    shapes = {name: entry.shape for x in weight_files(source) for name, entry in read_shard(x).entries.items()}
    layer, embedding = "model.layers.0.self_attn.q_proj", "model.embed_tokens.weight"
    with pytest.raises(BillhookError, match=f'as bf16, .*: leave it out with ignore="{layer}", or choose another'):
        like_types(file, source, shapes, {layer: [f"{layer}.weight"]})
    with pytest.raises(BillhookError, match="as bf16, which is no type to quantize to: choose another file"):
        like_types(file, source, shapes, {embedding: [embedding]})


def test_the_headers_of_all_parts_of_a_split_file_count(tmp_path, source):
    """The more bits, the more parts: one byte less than the largest types take is not met by them."""

    def written(**size: Any) -> int:
        fields = {"types": ["q4_0", "q8_0"], "split_size": 6000, "allocator": "uniform", **size, **FIELDS}
        checked = check(CompressRequest.given(model=source, output=tmp_path / "out", **fields))
        types = {name: grid.name for name, grid in decide(checked).quantizing.grids.items()}
        return file_bytes(checked.opened, types, "gptq", checked.request.gguf_form)

    most = written(bits=16.0)
    assert written(size=most - 1) < most


def test_defaults_may_be_missing_in_the_configuration_of_a_model_that_takes_the_types_of_another_file(tmp_path):
    model = gguf_families.save(tmp_path / "model", "gemma2", num_attention_heads=8, num_key_value_heads=4, head_dim=256)
    edit(str(model / "config.json"), query_pre_attn_scalar=256)
    write_gguf(model, tmp_path / "file.gguf", rest="q8_0")
    config = json.loads((model / "config.json").read_text())
    left_out = ("num_attention_heads", "num_key_value_heads", "head_dim", "query_pre_attn_scalar")
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in left_out}))
    shapes = {f"model.layers.0.self_attn.{x}_proj.weight": (n, 64) for x, n in (("q", 2048), ("k", 1024))}
    found = like_types(tmp_path / "file.gguf", model, shapes, {"q": ["model.layers.0.self_attn.q_proj.weight"]})
    assert found == {"q": "q8_0"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"allocator": "alphapruner"},
            r"Unknown level allocator 'alphapruner'. Did you mean 'alphapruning'\? .* auto, like",
        ),
        ({"allocator": "like:nowhere.gguf"}, "There is no file nowhere.gguf: write like:FILE.gguf"),
        ({"gama": 1}, r"Neither level allocator 'curves' nor quantizer 'gptq' has an option 'gama'.*damping"),
        ({"allocator": "auto", "gama": 1}, "Quantizer 'gptq' does not have an option 'gama'"),
        ({"allocator": "atp", "beta": 99, "size": "50KB"}, r"ATP's beta must be in \[0, "),
        ({}, "Give exactly one of size"),
        ({"size": "2GB", "bits": 3.0}, "Give exactly one of size"),
        ({"size": "two"}, "is not a number of bytes, such as 2.5GB"),
        ({"size": "9" * 400}, "is not a number of bytes, such as 2.5GB"),
        ({"bits": 0.0}, r"not a number of bits in \(0, 32\]"),
        ({"bits": float("nan")}, r"not a number of bits in \(0, 32\]"),
        ({"size": "1MB", "target": "exe"}, "target='exe' must be one of gguf"),
        ({"size": "1MB", "types": ["int4/64"]}, "gguf files cannot hold int4/64"),
        ({"size": "1MB", "types": ["q4_k"]}, r"divides the 32 columns of model.*allow a type .*types \(q8_0, [^:]*$"),
        ({"size": "1MB", "calibration": None}, "Choosing types needs activations"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_written(tmp_path, source, change, match):
    with pytest.raises(BillhookError, match=match):
        compress(source, tmp_path / "out", **{**FIELDS, **change})
    assert list(tmp_path.iterdir()) == []


def test_sizes_are_read_in_powers_of_ten_and_of_two():
    assert [parse_size(x) for x in ("2.5GB", "800 MB", "2GiB", "1k", 12)] == [
        2_500_000_000,
        800_000_000,
        2**31,
        1000,
        12,
    ]
    assert allowed_types("vllm", ())[0] == "int4/64"
    assert Size(ratio=0.5).size is None
