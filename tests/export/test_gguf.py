"""GGUF files: what is in them, by the reader of the `gguf` package, and what is refused before anything is written."""

import json
import shutil
from pathlib import Path

import gguf
import gguf_families
import numpy as np
import pytest
import tiny
import torch
from command import billhook, done
from safetensors.torch import load_file

from billhook.errors import BillhookError, JobError
from billhook.export.gguf import gguf_bytes, write_gguf
from billhook.steps.export import export_gguf
from billhook.store.gguf_file import read_gguf


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return gguf_families.save(tmp_path_factory.mktemp("llama") / "model", "llama", torch.bfloat16)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("mixtral") / "model", tiny.mixtral())


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, dequantized, by the reader of the `gguf` package."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def values(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a directory, in float32."""
    return {name: value.float().numpy() for name, value in load_file(path / "model.safetensors").items()}


def pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k where those of the two halves of a head take turns."""
    width = len(rows) // heads
    places = [h * width + half * width // 2 + i for h in range(heads) for i in range(width // 2) for half in (0, 1)]
    return rows[places]


def test_the_gguf_package_reads_the_same_weights_with_the_rows_of_q_and_k_in_pairs(llama, tmp_path):
    written = write_gguf(llama, tmp_path / "model.gguf")
    found, stored = tensors(written.path), values(llama)
    attention = "model.layers.2.self_attn"
    np.testing.assert_array_equal(found["blk.2.attn_q.weight"], pairs(stored[f"{attention}.q_proj.weight"], 4))
    np.testing.assert_array_equal(found["blk.2.attn_k.weight"], pairs(stored[f"{attention}.k_proj.weight"], 2))
    np.testing.assert_array_equal(found["blk.2.attn_v.weight"], stored[f"{attention}.v_proj.weight"])
    np.testing.assert_array_equal(found["token_embd.weight"], stored["model.embed_tokens.weight"])
    assert len(found) == len(stored)
    assert written.types == {"bf16": 30, "f32": 9}


def test_experts_are_stacked_in_the_order_of_their_numbers(mixtral, tmp_path):
    found = tensors(write_gguf(mixtral, tmp_path / "model.gguf", rest="f32").path)
    stored, name = values(mixtral), "model.layers.1.block_sparse_moe.experts"
    for own, other in {"gate": "w1", "down": "w2", "up": "w3"}.items():
        expected = np.stack([stored[f"{name}.{expert}.{other}.weight"] for expert in range(4)])
        np.testing.assert_array_equal(found[f"blk.1.ffn_{own}_exps.weight"], expected)


def test_packed_rows_take_the_place_of_the_weights_in_the_order_of_the_file(llama, mixtral, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_0
    for model in (llama, mixtral):
        stored = {name: v for name, v in values(model).items() if "k_proj" in name or "w3" in name or "up_" in name}
        packed = {name: ("q8_0", gguf.quantize(value, kind)) for name, value in stored.items()}
        written = write_gguf(model, tmp_path / "packed.gguf", packed, rest="q8_0")
        plain = write_gguf(model, tmp_path / "plain.gguf", rest="q8_0")
        assert written.path.read_bytes() == plain.path.read_bytes()


def test_the_metadata_holds_sizes_tokenizer_and_own_facts(llama, tmp_path):
    write_gguf(llama, tmp_path / "model.gguf", facts={"bits": 4.5, "method": "gptq"})
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    expected = {"architecture": "llama", "name": "Model", "file_type": gguf.LlamaFileType.MOSTLY_BF16}
    assert expected.items() <= {k.removeprefix("general."): v for k, v in fields.items()}.items()
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.dimension_count"] == 16
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == 4096
    assert fields["tokenizer.ggml.bos_token_id"] == 0
    assert (fields["billhook.bits"], fields["billhook.method"]) == (4.5, "gptq")


def test_numbers_have_the_types_that_llama_cpp_reads(llama, tmp_path):
    write_gguf(llama, tmp_path / "model.gguf", facts={"whole": 3, "part": 0.5, "so": True})
    kinds = {key: field.types[0].name for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    expected = {"llama.block_count": "UINT32", "llama.attention.layer_norm_rms_epsilon": "FLOAT32"}
    expected |= {"billhook.whole": "INT64", "billhook.part": "FLOAT64", "billhook.so": "BOOL"}
    assert {key: kinds[key] for key in expected} == expected


def test_routers_norms_and_rows_without_whole_blocks_keep_more_bits(mixtral, tmp_path):
    """The model is float32, and rows of w2 have 48 columns."""
    plain = ["token_embd", "blk.0.attn_q", "blk.0.ffn_gate_exps"]
    for rest, rows, short, file in [
        ("auto", "F16", "F16", "MOSTLY_F16"),
        ("bf16", "BF16", "BF16", "MOSTLY_BF16"),
        ("q8_0", "Q8_0", "F16", "MOSTLY_Q8_0"),
        ("f32", "F32", "F32", "ALL_F32"),
    ]:
        reader = gguf.GGUFReader(write_gguf(mixtral, tmp_path / f"{rest}.gguf", rest=rest).path)
        kinds = {tensor.name.removesuffix(".weight"): tensor.tensor_type.name for tensor in reader.tensors}
        assert {kinds[name] for name in plain} == {rows}
        assert kinds["blk.0.ffn_down_exps"] == short
        assert {kinds[name] for name in ("blk.0.ffn_gate_inp", "blk.0.attn_norm", "output_norm")} == {"F32"}
        assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[file]


def test_the_card_of_a_model_names_it(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "some-folder")
    write_gguf(folder, tmp_path / "folder.gguf")
    assert gguf.GGUFReader(tmp_path / "folder.gguf").fields["general.name"].contents() == "Some Folder"
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())))
    (folder / "README.md").write_text("---\nname: My Own Name\nlicense: mit\n---\n# x\n")
    fields = gguf.GGUFReader(write_gguf(folder, tmp_path / "card.gguf").path).fields
    assert fields["general.name"].contents() == "My Own Name"
    assert fields["general.license"].contents() == "mit"


@pytest.mark.parametrize("card", [b"\xff\xfe", b"---\nlicense: [\n---\n"], ids=["not UTF-8", "not YAML"])
def test_a_card_that_cannot_be_read_is_named(llama, tmp_path, card):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "README.md").write_bytes(card)
    with pytest.raises(BillhookError, match=r"model/README\.md is not a model card .*Repair or remove it"):
        write_gguf(model, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_of_the_hubs_cache_has_its_name_there(llama, tmp_path):
    folder = tmp_path / "models--owner--Small-1B" / "snapshots" / "0123456789abcdef"
    shutil.copytree(llama, folder)
    write_gguf(folder, tmp_path / "model.gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["general.name"].contents() == "Small-1B"


@pytest.mark.parametrize(
    "name, kind, shape, message",
    [
        ("model.layers.0.mlp.up_proj.weight", "q4_k", (96, 36), r"rows of 64 weights, which blocks of 256 \(q4_k\)"),
        ("model.layers.0.mlp.up_proj.weight", "q8_0", (96, 69), r"needs bytes of the shape \[96, 68\]"),
        ("model.layers.0.mlp.up_proj.weight", "int4", (96, 36), "int4 is no type of GGUF files"),
        ("model.layers.9.mlp.up_proj.weight", "q8_0", (96, 68), r"has no tensor model\.layers\.9\.mlp\.up_proj"),
    ],
)
def test_packed_bytes_that_do_not_fit_are_refused(llama, tmp_path, name, kind, shape, message):
    with pytest.raises(BillhookError, match=message):
        write_gguf(llama, tmp_path / "model.gguf", {name: (kind, np.zeros(shape, np.uint8))})
    assert not list(tmp_path.iterdir())


def test_experts_of_several_types_are_refused(mixtral, tmp_path):
    packed = {"model.layers.0.block_sparse_moe.experts.2.w1.weight": ("q8_0", np.zeros((48, 34), np.uint8))}
    with pytest.raises(BillhookError, match=r"experts of blk\.0\.ffn_gate_exps\.weight must share a type"):
        write_gguf(mixtral, tmp_path / "model.gguf", packed)


def test_a_family_without_names_and_one_that_llama_cpp_computes_otherwise_are_refused_by_name(tmp_path):
    other = {"norm_topk_prob": False}
    for name, changes, message in [
        ("granite", {}, r"No GGUF names are known for granite .*with template"),
        ("qwen3_moe", other, r"llama\.cpp computes qwen3_moe models with norm_topk_prob=True, and this one has False"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic' of llama",
        ),
    ]:
        model = gguf_families.save(tmp_path / name, name, **changes)
        with pytest.raises(BillhookError, match=message):
            write_gguf(model, tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()


def test_values_that_do_not_fit_the_type_leave_no_file(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e6
    tiny.save(tmp_path / "model", model)
    with pytest.raises(JobError, match=r"up_proj\.weight holds values that do not fit f16: use type=\"bf16\""):
        write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = torch.nan
    tiny.save(tmp_path / "model", model)
    for kind in ("f16", "f32", "q8_0"):
        with pytest.raises(JobError, match=r"up_proj\.weight holds NaN or infinite values"):
            write_gguf(tmp_path / "model", tmp_path / "model.gguf", rest=kind)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_is_unknown_or_damaged_is_one_error(llama, tmp_path):
    facts = json.loads((llama / "tokenizer.json").read_text())
    for change, message in [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"is split by \['Whitespace'\], which is not known to llama\.cpp"),
        ({"model": {"type": "Unigram"}}, "is a Unigram model"),
        ({"model": []}, "is damaged"),
    ]:
        model = gguf_families.save(tmp_path / "model", "llama")
        (model / "tokenizer.json").write_text(json.dumps(facts | change))
        with pytest.raises(BillhookError, match=message):
            write_gguf(model, tmp_path / "model.gguf")


def granite_template(path: Path, stored: dict[str, np.ndarray]) -> Path:
    """A file of an architecture that Billhook has no names for, as a converter would make it: rows of q in pairs."""
    writer = gguf.GGUFWriter(path, "granite")
    writer.add_block_count(4)
    writer.add_string("tokenizer.chat_template", "{{ messages }}")
    for block in range(4):
        query = pairs(stored[f"model.layers.{block}.self_attn.q_proj.weight"], 4)
        writer.add_tensor(f"blk.{block}.attn_q.weight", query.astype(np.float16))
        writer.add_tensor(f"blk.{block}.attn_norm.weight", stored[f"model.layers.{block}.input_layernorm.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_template_gives_names_and_order_of_rows_for_an_unknown_architecture(tmp_path):
    model, kind = gguf_families.save(tmp_path / "granite", "granite"), gguf.GGMLQuantizationType.Q8_0
    stored = values(model)
    template = granite_template(tmp_path / "f16.gguf", stored)
    names = [f"model.layers.{block}.self_attn.q_proj.weight" for block in range(4)]
    packed = {name: ("q8_0", gguf.quantize(stored[name], kind)) for name in names}
    found = tensors(write_gguf(model, tmp_path / "q8_0.gguf", packed, template=template).path)
    for block, name in enumerate(names):
        expected = gguf.dequantize(gguf.quantize(pairs(stored[name], 4), kind), kind)
        np.testing.assert_array_equal(found[f"blk.{block}.attn_q.weight"], expected)
        norm = stored[f"model.layers.{block}.input_layernorm.weight"]
        np.testing.assert_array_equal(found[f"blk.{block}.attn_norm.weight"], norm)
    reader = gguf.GGUFReader(tmp_path / "q8_0.gguf")
    assert reader.fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    other = gguf_families.save(tmp_path / "other", "granite", num_hidden_layers=5)
    name = "model.layers.4.self_attn.q_proj.weight"
    with pytest.raises(BillhookError, match=rf"rows of {name} are not in .*f16\.gguf: make that file from this model"):
        write_gguf(other, tmp_path / "x.gguf", {name: ("q8_0", np.zeros((64, 68), np.uint8))}, template=template)


def test_a_template_gives_the_metadata_of_a_known_architecture_with_the_weights_of_the_model(llama, mixtral, tmp_path):
    template = write_gguf(llama, tmp_path / "f32.gguf", rest="f32").path
    changed = gguf_families.save(tmp_path / "changed", "llama", rms_norm_eps=1e-4)
    (changed / "tokenizer.json").unlink()
    written = write_gguf(changed, tmp_path / "out.gguf", template=template)
    fields = gguf.GGUFReader(written.path).fields
    assert fields["general.name"].contents() == "Model"
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    up = tensors(written.path)["blk.0.ffn_up.weight"]
    np.testing.assert_array_equal(up, values(changed)["model.layers.0.mlp.up_proj.weight"].astype(np.float16))
    with pytest.raises(
        BillhookError, match=r"output\.weight is \[258, 32\] in the model, and .* has one of \[4096, 64\]"
    ):
        write_gguf(mixtral, tmp_path / "x.gguf", template=template)


def test_a_file_in_parts_is_read_as_one_by_any_part_and_by_the_gguf_package(mixtral, tmp_path):
    whole = write_gguf(mixtral, tmp_path / "whole.gguf")
    written = write_gguf(mixtral, tmp_path / "model.gguf", split=60_000)
    count = len(written.parts)
    assert [path.name for path in written.parts] == [f"model-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    assert 2 < count < 9
    assert sorted(tmp_path.glob("model*")) == list(written.parts)
    assert (
        gguf_bytes(mixtral, {}, split=60_000, facts={}) == written.bytes == sum(x.stat().st_size for x in written.parts)
    )
    one = read_gguf(whole.path)
    for part in written.parts:
        found = read_gguf(part)
        assert found.path == written.parts[0]
        assert found.metadata == one.metadata
        assert list(found.tensors) == list(one.tensors)
        assert all(np.array_equal(found.raw(x), one.raw(one.tensors[name])) for name, x in found.tensors.items())
    expected = tensors(whole.path)
    read = {name: values for part in written.parts for name, values in tensors(part).items()}
    assert all(np.array_equal(read[name], expected[name]) for name in expected | read)
    fields = gguf.GGUFReader(written.parts[1]).fields
    assert [fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")] == [1, count, len(expected)]


def test_parts_that_exist_are_replaced_only_where_that_is_allowed_and_they_are_not_read(mixtral, tmp_path, monkeypatch):
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    fields = {"output": tmp_path / "model.gguf", "split_size": 60_000}
    parts = export_gguf(mixtral, **fields).parts
    with pytest.raises(BillhookError, match=rf"The output .*{parts[0].name} exists: choose another"):
        export_gguf(mixtral, **fields)
    assert export_gguf(mixtral, **fields, overwrite=True).parts == parts
    with pytest.raises(BillhookError, match="is a file of the model, or one that is read"):
        export_gguf(parts[1], **fields, overwrite=True)


def test_parts_that_are_missing_renamed_or_swapped_are_one_error(mixtral, tmp_path):
    first, second, *_, last = write_gguf(mixtral, tmp_path / "model.gguf", split=60_000).parts
    last.rename(tmp_path / "kept")
    with pytest.raises(BillhookError, match=rf"is one of \d parts \({last.name} is missing\): put all"):
        read_gguf(second)
    shutil.copy(second, last)
    with pytest.raises(BillhookError, match="do not belong together"):
        read_gguf(first)
    shutil.copy(first, tmp_path / "alone.gguf")
    with pytest.raises(BillhookError, match="is one of 3 parts: put all of them into one folder as NAME-00001-of-"):
        read_gguf(tmp_path / "alone.gguf")


@pytest.mark.gate
def test_the_command_writes_a_file_and_the_record_of_a_pruned_model_beside_it(place):
    done("prune", "model", "-o", "pruned", "--sparsity", "0.5", "--criterion", "magnitude")
    ran = done("export", "pruned", "--to", "gguf", "--type", "q8_0", "-o", "pruned.gguf", "--json")
    assert ran.json["types"]["q8_0"] > 4
    record = json.loads(Path("pruned.billhook.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["prune", "export"]
    assert list(record["files"]) == ["pruned.gguf"]
    assert gguf.GGUFReader("pruned.gguf").fields["billhook.steps"].contents() == "prune"
    again = billhook("export", "pruned", "--to", "gguf", "-o", "pruned.gguf")
    assert (again.code, "exists: choose another" in again.err) == (2, True)
