"""The report of a pruned directory: report.json, model card, page. What a browser makes of the page is in
test_report_in_a_browser.py."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import tiny
import yaml
from command import billhook, done
from transformers import AutoConfig

from billhook import pack, prune, unpack, verify
from billhook.reports.card import card
from billhook.reports.page import page
from billhook.reports.report import load_report, source_metadata
from billhook.store.checkpoint import read_config
from billhook.tasks.opening import task_of_config

CARD = """---
license: apache-2.0
language: [en, "no"]
base_model: owner/older
tags:
- medical
pipeline_tag: text-generation
widget: {text: "/home/me/secret"}
---
# Mine
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.save(folder / "model")
    (folder / "model" / "README.md").write_text(CARD)
    tiny.text_file(folder / "text.txt", copies=60)
    prune(
        folder / "model",
        sparsity=0.5,
        recipe="owl",
        calibration=str(folder / "text.txt"),
        samples=4,
        length=32,
        output=folder / "pruned",
    )
    return folder


def metadata(text: str) -> dict:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL).group(1))


@pytest.fixture
def pruned(place, tmp_path):
    return shutil.copytree(place / "pruned", tmp_path / "pruned")


def test_the_report_counts_what_the_record_says(pruned):
    report = load_report(pruned)
    record = json.loads((pruned / "billhook.json").read_text())
    assert report["achieved"]["zeros"] == sum(layer["zeros"] for layer in record["layers"].values())
    assert [layer["layer"] for layer in report["layers"]] == list(record["layers"])
    assert report["asked"]["allocator"] == "owl"
    assert all("outlier_ratio:5" in layer["metrics"] for layer in report["layers"])
    assert all(0 < layer["error"] < 1 for layer in report["layers"])
    assert [block["block"] for block in report["blocks"]] == [0, 1, 2]
    for block in report["blocks"]:
        rows = [layer for layer in report["layers"] if layer["block"] == block["block"]]
        assert block["sparsity"] == sum(r["zeros"] for r in rows) / sum(r["shape"][0] * r["shape"][1] for r in rows)
    assert (
        report["files"]["packed_bytes_estimate"]
        < report["files"]["weights_bytes"]
        == (pruned / "model.safetensors").stat().st_size
    )


def test_the_card_has_metadata_that_the_hub_reads(pruned):
    text = (pruned / "README.md").read_text()
    head = metadata(text)
    assert head["license"] == "apache-2.0"
    assert head["language"] == ["en", "no"]
    assert head["base_model"] == "owner/older"
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert {"medical", "pruned", "wanda", "owl"} <= set(head["tags"])
    assert "widget" not in head
    for words in (
        "50.00 %",
        "arXiv:2306.11695",
        "arXiv:2310.05175",
        "AutoModelForCausalLM",
        "4 windows of 32 tokens",
        "## Limitations",
    ):
        assert words in text, words
    report = load_report(pruned)
    report["model"] = {**report["model"], "name": "owner/name"}
    assert metadata(card(report))["base_model"] == "owner/name"


@pytest.mark.parametrize(
    ("kind", "model_class"),
    [
        ("llama", "LlamaForCausalLM"),
        ("bert", "BertForMaskedLM"),
        ("bert", "BertModel"),
        ("vit", "ViTForImageClassification"),
        ("llava", "LlavaForConditionalGeneration"),
        ("t5", "T5ForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
    ],
)
def test_the_pipeline_of_the_card_is_the_task_of_the_model(kind, model_class, pruned):
    config = AutoConfig.for_model(kind)
    config.architectures = [model_class]
    config.save_pretrained(pruned)
    task = task_of_config(pruned, read_config(pruned))
    head = source_metadata(pruned)
    assert head["pipeline_tag"] == task.name
    assert task.auto_class in card(load_report(pruned) | {"metadata": head})


@pytest.mark.parametrize("head", ["license: [", "- a\n- b", "base_model: /home/me/model\nlicense: {a: b}\ntags: 3"])
def test_metadata_that_a_hub_could_not_read_are_left_out(pruned, head):
    (pruned / "README.md").write_text(f"---\n{head}\n---\n")
    (pruned / "report.json").unlink()
    done("report", pruned)
    assert not metadata((pruned / "README.md").read_text()).keys() & {"license", "base_model"}


def test_what_is_written_names_no_local_folder(place, tmp_path):
    (tmp_path / "given.json").write_text('{"layers": {"mlp.down_proj": 0.4}}')
    options = {"allocator": "explicit", "criterion": "wanda", "file": str(tmp_path / "given.json")}
    text = {"calibration": str(place / "text.txt"), "samples": 4, "length": 32}
    prune(place / "model", sparsity=0.5, **options, **text, output=tmp_path / "pruned")
    words = ["--data", place / "text.txt", "--length", 32, "--limit", 4, "--against", place / "model", "--report"]
    done("eval", tmp_path / "pruned", *words)
    for path in (tmp_path / "pruned").iterdir():
        found = path.read_bytes()
        assert not any(str(folder).encode() in found for folder in (place, tmp_path)), path.name
    report = load_report(tmp_path / "pruned")
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "of text.txt" in card
    assert report["calibration"]["digest"][:16] in card


def test_verification_ignores_reports_and_reports_are_deterministic(place, pruned):
    prune(
        place / "model",
        sparsity=0.5,
        recipe="owl",
        calibration=str(place / "text.txt"),
        samples=4,
        length=32,
        output=place / "twin",
    )
    for name in ("report.json", "report.html", "README.md", "billhook.json"):
        assert (place / "twin" / name).read_bytes() == (pruned / name).read_bytes(), name
    before = (pruned / "report.html").read_bytes()
    for name in ("report.json", "report.html", "README.md"):
        (pruned / name).unlink()
    assert done("verify", pruned, "--json").json["ok"]
    done("report", pruned)
    assert b"apache" not in before
    assert (pruned / "report.html").read_bytes() == before


def test_evaluations_are_added_once_and_kept(place, pruned):
    words = ["--data", place / "text.txt", "--length", 32, "--limit", 4]
    for _ in range(2):
        done("eval", pruned, *words, "--against", place / "model", "--report")
    items = pruned.parent / "items.jsonl"
    items.write_text('{"requests": [["a", " b"], ["a", " c"]], "gold": 1}\n')
    done("eval", pruned, "--tasks", items, "--report")
    report = done("report", pruned, "--json").json
    assert len(report["evaluations"]) == 2
    assert len(report["evaluations"][0]["against"]["error_by_block"]) == 3
    text, html = (pruned / "README.md").read_text(), (pruned / "report.html").read_text()
    for found in (text, html):
        assert f"{report['evaluations'][0]['token_ppl']:.4f}" in found
        assert "token perplexity, non-overlapping windows" in found
        assert "items, 1 items, as written in the file" in found
    assert "model-index:" in text
    assert "Error of each block&#39;s output" in html
    assert done("verify", pruned, "--json").json["ok"]
    again = done("compare", "--runs", pruned, pruned, "--json").json
    assert again["runs"][0]["nll"] == report["evaluations"][0]["nll"]


@pytest.mark.nightly
def test_speed_is_added_from_a_benchmark(place, pruned):
    done("pack", pruned, "-o", pruned.parent / "packed")
    words = ["--batch", 1, "--prompt", 4, "--new", 2, "--rounds", 1, "--json"]
    found = done("bench", pruned.parent / "packed", "--against", place / "model", *words)
    (pruned.parent / "bench.json").write_text(found.out)
    done("report", pruned, "--speed", pruned.parent / "bench.json")
    for _ in range(2):
        text = (pruned / "report.html").read_text()
        packed = next(model for model in found.json["models"] if model["packed"])
        assert (
            f"{packed['cells'][0]['decode']['median']:,.1f} ({packed['cells'][0]['decode_speedup']['median']:.2f} x)"
            in text
        )
        assert found.json["hardware"]["processor"] in text
        done("report", pruned)


@pytest.mark.parametrize(
    ("prompt", "decode", "header"),
    [
        (4, True, ["prompt, tokens", "prefill, tokens/s", "decode, tokens/s"]),
        (4, False, ["prompt, tokens", "tokens/s"]),
        (None, False, ["images/s"]),
    ],
)
def test_the_speed_of_models_that_generate_nothing_has_no_columns_without_a_meaning(pruned, prompt, decode, header):
    speed, ratio = ({"median": x, "low": x, "high": x} for x in (1234.5, 1.75))
    cell = {"batch": 1, "prompt": prompt, "prefill": speed, "prefill_speedup": ratio}
    cell |= {"decode": speed, "decode_speedup": None} if decode else {"decode": None, "decode_speedup": None}
    side = {"name": "small", "file_bytes": 1, "memory_bytes": 1, "cells": [cell]}
    (pruned.parent / "bench.json").write_text(json.dumps({"models": [side]}))
    done("report", pruned, "--speed", pruned.parent / "bench.json")
    text = (pruned / "report.html").read_text().partition("Measured speed")[2].partition("</table>")[0]
    assert re.findall(r"<th scope.*?>(.*?)</th>", text) == ["model", "batch", *header, "weight files", "peak memory"]
    row = ["1", *([str(prompt)] if prompt else []), "1,234.5 (1.75 x)", *(["1,234.5"] if decode else [])]
    assert re.findall(r"<td.*?>(.*?)</td>", text)[:-2] == ["small", *row]


def test_speed_is_added_from_a_file_of_ones_own(pruned):
    (pruned.parent / "own.json").write_text('{"machine": "a machine", "decode": {"dense": 10, "packed": 14}}')
    done("report", pruned, "--speed", pruned.parent / "own.json")
    assert "dense 10, packed 14" in (pruned / "report.html").read_text()
    (pruned.parent / "bad.json").write_text('{"models": [{"cells": [{}]}]}')
    ran = billhook("report", pruned, "--speed", pruned.parent / "bad.json")
    assert (ran.code, "is not that of billhook bench --json" in ran.err) == (2, True)
    assert "dense 10, packed 14" in (pruned / "report.html").read_text()


class Tags(HTMLParser):
    """All tags with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_asks_for_nothing_from_elsewhere(pruned):
    text = (pruned / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not [a for _, a in tags.found if str(a.get("src", a.get("href", "data:")))[:5] != "data:"]
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert text.count("<svg") == text.count('role="img" aria-label="')


def test_names_cannot_break_out_of_the_page(pruned):
    report = load_report(pruned)
    report["model"] = {**report["model"], "name": "<script>alert(1)</script>"}
    report["warnings"] = ["<img src=x onerror=alert(1)>"]
    text = page(report)
    assert "<script>alert" not in text
    assert "<img" not in text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: [f.unlink() for f in d.glob("*.json")], "has no results to report"),
        (lambda d: (d / "report.json").write_text("{"), "not valid json"),
        (lambda d: (d / "report.json").write_text('{"version": 9}'), "not a report of version 1"),
        (lambda d: (d / "report.json").write_text('{"version": 1, "asked": []}'), "is damaged"),
        (lambda d: ((d / "report.json").unlink(), (d / "billhook.json").write_text('{"plan": {}}')), "not a record"),
        (lambda d: shutil.rmtree(d), "There is no directory"),
    ],
)
def test_directories_without_results_are_named(pruned, spoil, message):
    spoil(pruned)
    before = {p.name: p.read_bytes() for p in pruned.iterdir()} if pruned.is_dir() else {}
    ran = billhook("report", pruned)
    assert ran.code == 2
    assert message in ran.err
    assert before == ({p.name: p.read_bytes() for p in pruned.iterdir()} if pruned.is_dir() else {})


def test_an_evaluation_is_not_written_into_a_dense_model(place):
    ran = billhook("eval", place / "model", "--data", place / "text.txt", "--length", 32, "--report")
    assert ran.code == 2
    assert "is not a pruned directory" in ran.err


def test_the_card_of_a_quantized_directory_is_written_again(place, tmp_path):
    folder = tmp_path / "quantized"
    done("quantize", place / "model", "--type", "int8", "--quantizer", "round", "-o", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "README.md").write_bytes(before["README.md"].replace(b"round to nearest", b"by hand"))
    done("report", folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_card_of_a_packed_directory_says_so_and_shows_evaluations(pruned, tmp_path):
    packed = pack(pruned, tmp_path / "packed")
    report = load_report(packed.output)
    assert report["files"] == {
        "packed": True,
        "weights_bytes": packed.packed_bytes,
        "packed_bytes_estimate": packed.packed_bytes,
    }
    assert "billhook.load" in (packed.output / "README.md").read_text()
    assert "zeros stored like other weights" not in (packed.output / "report.html").read_text()
    (packed.output / "report.json").write_text(json.dumps({**report, "speed": {"note": "added later"}}))
    assert verify(packed.output).ok
    dense = unpack(packed.output, tmp_path / "dense")
    assert verify(dense).ok
    assert load_report(dense) == {**load_report(pruned), "speed": {"note": "added later"}}
