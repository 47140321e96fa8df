"""Every command: exit codes, one JSON object on stdout and everything else on stderr, help with examples, dry runs that
write nothing."""

import json
import os
import re
import tomllib

import pytest
import tiny
import torch
import typer
from command import billhook, done, listing
from paths import ROOT
from safetensors.torch import save_file

from billhook import __version__
from billhook.cli import app
from billhook.cli.ls import KINDS
from billhook.cli.options import fraction
from billhook.demo import removed_blocks, run_demo
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, allocate
from billhook.plan.metrics import FACTS
from billhook.plan.table import Row, Table

COMMANDS = [command.name for command in app.registered_commands]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=2))
    tiny.text_file(folder / "text.txt", 60)
    done("measure", folder / "model", "-o", folder / "table.json", "--metrics", "alpha_peak,alpha_mid")
    return folder


@pytest.fixture
def text(place):
    return ("--calibration", place / "text.txt", "--samples", "4", "--length", "32")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_parse(command):
    ran = done(command, "--help")
    assert ran.err == ""
    examples = ran.out.partition("Examples:")[2].strip().splitlines()
    assert examples
    for example in examples:
        assert re.match(rf" *billhook ({'|'.join(COMMANDS)})\b", example), example
        known = done(example.split()[1], "--help").out
        for option in re.findall(r" (--?[a-z][\w-]*)", example):
            assert re.search(rf"(?<![\w-]){option}\b", known), f"{example}: {option}"


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("demo", "ls")])
def test_every_command_has_json(command):
    assert "--json" in done(command, "--help").out
    ran = billhook(command, "--json")
    assert ran.code == 2
    assert ran.json["exit_code"] == 2
    assert ran.err == f"billhook: {ran.json['error']}\n"


def test_no_command_prints_help_and_exits_with_2():
    ran = billhook()
    assert ran.code == 2
    assert ran.out == ""
    assert all(command in ran.err for command in COMMANDS)
    assert done("--help").out.strip() == ran.err.strip()


def test_help_groups_every_command_and_cuts_no_line():
    shown = done("-h").out
    assert "Others:" not in shown
    assert "..." not in shown.partition("Make a smaller model:")[2]
    for command in app.registered_commands:
        words = (command.callback.__doc__ or "").partition("\n")[0].split()
        assert " ".join([command.name, *words]).rstrip(".") in " ".join(shown.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_usage_names_arguments_in_capitals_and_short_help_works(command):
    usage = done(command, "-h").out.partition("\n\n")[0]
    assert not re.search(r"[{}]", usage)
    assert not re.search(r" [a-z_]+$", usage)
    assert done(command, "-h").out == done(command, "--help").out


@pytest.mark.parametrize("word", ["good", "wanda", "owl", "admm"])
def test_the_help_of_prune_shows_the_names_to_choose_from(word):
    assert word in done("prune", "-h").out


def test_shells_complete_names(monkeypatch):
    from typer.testing import CliRunner

    asked = {"_BILLHOOK_COMPLETE": "complete_bash", "COMP_WORDS": "billhook prune m --recipe go", "COMP_CWORD": "4"}
    ran = CliRunner().invoke(app, [], prog_name="billhook", env=asked)
    assert ran.stdout.split() == ["good"]


def test_the_version_is_printed():
    assert done("--version").out == f"billhook {__version__}\n"


def test_python_m_billhook_is_the_command():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"billhook": "billhook.__main__:main"}


# measure, plan


def test_the_measure_command_writes_a_table(place, text, tmp_path):
    ran = done(
        "measure",
        place / "model",
        "-o",
        tmp_path / "t.json",
        "--metrics",
        "outlier_ratio:5, alpha_mid",
        *text,
        "--json",
    )
    assert ran.json["output"] == str(tmp_path / "t.json")
    assert ran.json["layers"] == 14
    assert {"outlier_ratio:5", "alpha_mid"} <= set(ran.json["columns"])
    assert "14 layers" in ran.err
    made_by = json.loads((tmp_path / "t.json").read_text())["made_by"]
    assert made_by["calibration"]["samples"] == 4
    ran = done("measure", place / "model", "-o", tmp_path / "u.json", "--targets", "re:.*q_proj")
    assert ran.out == ""
    assert len(json.loads((tmp_path / "u.json").read_text())["rows"]) == 2


def test_paths_may_begin_with_a_tilde_and_the_current_folder_has_its_name(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(place / "model")
    ran = done("measure", ".", "--output=~/t.json")
    assert "the weights of model are" in ran.err
    done("plan", "~/t.json", "--allocator", "uniform", "--sparsity", "0.5", "--output=~/plan.json")
    assert {"t.json", "plan.json"} <= {path.name for path in tmp_path.iterdir()}


def test_plan_prints_a_table_for_people_and_json_for_machines(place, tmp_path):
    shown = done("plan", place / "table.json", "--sparsity", "0.5", "--allocator", "atp")
    assert "Sparsity by block" in shown.out
    assert "atp: sparsity 0.5 over 14 layers" in shown.err
    written = done(
        "plan", place / "table.json", "--sparsity", "0.5", "--allocator", "atp", "-o", tmp_path / "plan.json"
    )
    assert written.out == ""
    printed = done("plan", place / "table.json", "--sparsity", "0.5", "--allocator", "atp", "--json").json
    assert printed == json.loads((tmp_path / "plan.json").read_text())
    assert done("plan", place / "table.json", "--pattern", "2:4", "--allocator", "uniform", "--json").json[
        "budget"
    ] == {"sparsity": 0.5}


# prune, verify, eval


def test_the_prune_command_reports_what_it_did(place, text, tmp_path):
    ran = done(
        "prune", place / "model", "-o", tmp_path / "pruned", "--sparsity", "0.5", "--recipe", "fast", *text, "--json"
    )
    assert ran.json["output"] == str(tmp_path / "pruned")
    assert ran.json["sparsity"] == ran.json["target"] == 0.5
    assert set(ran.json) == {"output", "sparsity", "target", "seconds", "lost", "better_recipe", "warnings", "layers"}
    assert re.search(r"^What was lost: .*: KL divergence from the dense model", ran.err, re.MULTILINE)
    assert "Less is lost with --recipe good." in ran.err
    assert "50.0000% of 18,432 weights removed" in ran.err
    quiet = done("prune", place / "model", "-o", tmp_path / "again", "--sparsity", "0.5", "--recipe", "fast", *text)
    assert quiet.out == ""


def test_the_report_of_a_slimmed_model_says_what_stayed_and_its_shape_can_be_given_again(place, text, tmp_path):
    what = ("--units", "channels,heads", *text)
    ran = done("slim", place / "model", "-o", tmp_path / "small", "--remove", "25%", *what, "--json")
    shown = done("report", tmp_path / "small")
    kept = kept_parts(tmp_path / "small")
    heads, channels = (kept[f"model.layers.0.{unit}"] for unit in ("self_attn:heads", "mlp:channels"))
    assert re.search(rf"^0 +{len(heads)} of 2: .* +{len(channels)} of 64$", shown.out, re.MULTILINE)
    assert "KL divergence" in shown.err
    assert f"{len(heads)} of 2 key/value heads stay; {len(channels)} of 64 channels stay." in ran.err
    assert f" {len(channels)} of 64 |" in (tmp_path / "small" / "README.md").read_text()
    assert done("report", tmp_path / "small", "--json").json["removed"] == ran.json["removed"]
    done("verify", tmp_path / "small")
    done("slim", place / "model", "-o", tmp_path / "again", "--plan", tmp_path / "small/shape.json", *what)
    assert kept_parts(tmp_path / "again") == kept


def kept_parts(folder):
    return json.loads((folder / "billhook.json").read_text())["steps"][-1]["made_by"]["kept"]


@pytest.mark.parametrize("output", [(), ("--output", "planned")])
def test_a_dry_run_writes_nothing(place, text, monkeypatch, output):
    monkeypatch.chdir(place)
    before = listing(place)
    command = ("prune", "model", "--sparsity", "0.5", "--recipe", "alphapruning", *text, *output, "--dry-run")
    ran = done(*command)
    rows = re.findall(r"^(model\.layers\S+) +(\d+) x (\d+) +(0\.\d+)", ran.out, flags=re.MULTILINE)
    assert len(rows) == 14
    assert re.search(
        r"About .* GiB of memory and .* GiB of disk\.\n"
        r"About .* s of work, measured on 2 of 2 blocks with .* windows in .* s\.\n"
        r"14 layers, 18,432 weights, sparsity 0\.5, pattern unstructured\.\n"
        r"The plan took .* s to make\. Nothing was written\.",
        ran.err,
    )
    machine = done(*command, "--json").json
    assert set(machine) == {"layers", "target", "pattern", "estimate"}
    assert {name: f"{layer['sparsity']:.4f}" for name, layer in machine["layers"].items()} == {
        name: s for name, *_, s in rows
    }
    assert listing(place) == before


def test_a_dry_run_has_one_line_for_layers_that_are_alike(place, monkeypatch):
    monkeypatch.chdir(place)
    ran = done("prune", "model", "--sparsity", "60%", "--criterion", "magnitude", "--dry-run")
    rows = re.findall(r"^(\S+), 2 layers +\d+ x \d+ +0\.6000$", ran.out, flags=re.MULTILINE)
    assert len(rows) == 7
    assert "14 layers, 18,432 weights, sparsity 0.6" in ran.err


@pytest.mark.gate
def test_a_dry_run_lists_what_is_never_pruned(tmp_path):
    tiny.save(tmp_path / "model", tiny.mixtral())
    ran = done("prune", tmp_path / "model", "--sparsity", "0.5", "--criterion", "magnitude", "--dry-run")
    assert "Never pruned (routes tokens): model.layers.*.mlp.gate.\n" in ran.err


@pytest.mark.parametrize("command", [("quantize", "--type", "q8_0"), ("compress", "--bits", "10")])
def test_quantizing_can_be_tried_without_writing_models(place, tmp_path, text, command):
    name, *how = command
    ran = done(name, place / "model", *how, *text, "--set", "sweeps=0", "-o", tmp_path / "out", "--dry-run")
    assert re.search(r"^self_attn\.q_proj +\d +q\S+$", ran.out, flags=re.MULTILINE), ran.out
    assert re.search(
        r"About .* GiB of memory and .* GiB of disk\.\n"
        r"About .* of work, measured on 1 of 2 blocks with .* windows in .* s\.\n",
        ran.err,
    )
    kept = tmp_path / "out.partial" / "billhook.levels.json"
    left = (
        f"Only what was measured was written, to {kept}: the run uses it"
        if name == "compress"
        else "Nothing was written"
    )
    assert re.search(rf"14 layers at .* bits a weight\. {re.escape(left)}\.$", ran.err)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == ([kept] if name == "compress" else [])


def test_verify_fails_on_a_difference(place, tmp_path):
    done("prune", place / "model", "-o", tmp_path / "pruned", "--sparsity", "0.5", "--criterion", "magnitude")
    good = done("verify", tmp_path / "pruned", "--json")
    assert good.json["ok"]
    assert "verified, 1 step, 14 layers, 9,216 zeros of 18,432 weights" in good.err
    (tmp_path / "pruned" / "config.json").write_text("{}")
    bad = billhook("verify", tmp_path / "pruned", "--json")
    assert bad.code == 1
    assert not bad.json["ok"]
    assert "problem: config.json is not the file that was written" in bad.err


def test_the_eval_command_prints_and_writes_its_numbers(place, tmp_path):
    ran = done("eval", place / "model", "--data", place / "text.txt", "--length", "64", "--limit", "5", "--json")
    assert {"token_ppl", "tokens", "windows", "length"} <= set(ran.json)
    assert (ran.json["windows"], ran.json["length"], ran.json["tokens"]) == (5, 64, 5 * 63)
    assert ran.json["bits_per_byte"] > 0
    assert "token perplexity" in ran.err
    save_file({"tokens": torch.zeros(3, 16, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    ran = done("eval", place / "model", "--data", tmp_path / "tokens.safetensors", "--json")
    assert (ran.json["windows"], ran.json["length"], ran.json["bits_per_byte"]) == (3, 16, None)


def test_an_infinite_perplexity_is_still_json(tmp_path):
    model = tiny.llama(num_hidden_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    tiny.save(tmp_path / "model", model)
    save_file({"tokens": torch.randint(0, 256, (2, 16))}, tmp_path / "tokens.safetensors")
    ran = done("eval", tmp_path / "model", "--data", tmp_path / "tokens.safetensors", "--json")
    assert ran.json["token_ppl"] is None
    assert ran.json["nll"] > 709


# ls


def test_ls_alone_lists_everything_that_can_be_named():
    rows = done("ls", "--json").json
    assert {"good", "owl@70"} <= {row["name"] for row in rows["recipes"]}
    assert {*ALLOCATORS.names(), "rco", "auto"} == {row["name"] for row in rows["allocators"]}
    assert set(rows) == set(KINDS)
    shown = done("ls").out
    assert all(name in shown for name in ("good", "auto", "admm", "gptq", "iq3_s", "alpha_peak", "gpt_oss"))


@pytest.mark.parametrize(
    "kind, names", [("allocators", ALLOCATORS.names()), ("criteria", CRITERIA.names()), ("metrics", list(FACTS))]
)
def test_ls_lists_every_registry(kind, names):
    rows = done("ls", kind, "--json").json[kind]
    assert {row["name"] for row in rows} >= set(names)
    assert all(row["paper"] for row in rows)
    shown = done("ls", kind)
    assert shown.err == ""
    assert all(name in shown.out for name in names)


def test_ls_families_lists_every_tested_family():
    found = done("ls", "families", "--json").json["families"]
    assert {"model_type": "gpt_oss", "task": "text-generation"} in found
    assert {"model_type": "resnet", "task": "image-classification"} in found
    assert "llama" in done("ls", "families").out


def test_a_sparsity_is_a_number_or_in_per_cent_and_may_be_a_default():
    assert fraction("0.6") == fraction("60%") == fraction(0.6) == 0.6
    with pytest.raises(typer.BadParameter, match="is no number"):
        fraction("half")


def test_the_demo_says_why_a_published_setting_removes_a_block():
    rows = [Row(f"b.{n}.w", n, "w", (8, 8), {"alpha_peak": 9.0 if n == 11 else 2.0}) for n in range(12)]
    table = Table(tuple(rows))
    (note,) = removed_blocks(allocate(table, 0.6, allocator="alphapruning"), table)
    assert "epsilon of 0.3, alphapruning removes block 11 whole: the other 11 blocks are alike" in note
    assert removed_blocks(allocate(table, 0.6), table) == []


def test_the_demo_replaces_nothing_but_a_demo(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BillhookError, match="holds no earlier demo"):
        run_demo(tmp_path, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(monkeypatch, before, after):
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert billhook("--version").code == 0
    assert os.environ["OMP_WAIT_POLICY"] == after
