"""The main job from a model directory to a pruned one: the same bits again, the same layout, and it loads where
Billhook is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from command import billhook, done, listing
from pruning import TEXT, prune
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.tasks.opening import load_model

REPORT = {"report.json", "README.md", "report.html"}


IDS = torch.arange(2 * 24).reshape(2, 24)


def test_measure_plan_prune_verify_and_eval_work_together(place, tmp_path):
    text, table, plan, output = (
        str(place / "text.txt"),
        tmp_path / "table.json",
        tmp_path / "plan.json",
        tmp_path / "pruned",
    )
    metrics = "alpha_peak,outlier_ratio:5"
    measured = done(
        "measure", place / "model", "-o", table, "--metrics", metrics, "--calibration", text, *TEXT, "--json"
    ).json
    assert measured["layers"] == 14
    made = done("plan", table, "--allocator", "owl", "--sparsity", "0.6", "--set", "lam=0.1", "-o", plan, "--json").json
    assert made == json.loads(plan.read_text())
    report = prune(place, output, "--plan", str(plan), "--criterion", "wanda")
    assert report["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert {name: layer["planned"] for name, layer in report["layers"].items()} == made["weights"]
    assert report["warnings"] == []
    verified = done("verify", output, "--json").json
    assert verified["ok"]
    assert verified["zeros"] == sum(layer["zeros"] for layer in report["layers"].values())
    before, after = (
        done("eval", model, "--data", text, "--length", "64", "--json").json for model in (place / "model", output)
    )
    assert before["tokens"] == after["tokens"] == before["windows"] * 63
    assert before["token_ppl"] != after["token_ppl"]
    assert after["bits_per_byte"] > 0
    record = json.loads((output / "billhook.json").read_text())
    (step,) = record["steps"]
    assert step["plan"] == made
    assert step["made_by"]["papers"] == {"criterion": CRITERIA.paper("wanda"), "allocator": ALLOCATORS.paper("owl")}


def test_planning_while_pruning_gives_the_plan_of_two_commands(place, tmp_path):
    options = ("--allocator", "alphapruning", "--set", "epsilon=0.2")
    done("measure", place / "model", "-o", tmp_path / "table.json")
    done("plan", tmp_path / "table.json", *options, "--sparsity", "0.5", "-o", tmp_path / "plan.json")
    prune(place, tmp_path / "one", *options)
    prune(place, tmp_path / "two", "--plan", str(tmp_path / "plan.json"))
    prune(place, tmp_path / "three", "--table", str(tmp_path / "table.json"), *options)
    one, two, three = (listing(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two == three


def test_the_same_seed_gives_the_same_bytes(place, pruned, tmp_path):
    prune(place, tmp_path / "again", "--criterion", "sparsegpt")
    prune(place, tmp_path / "other", "--criterion", "sparsegpt", "--seed", "1")
    first, again, other = listing(pruned), listing(tmp_path / "again"), listing(tmp_path / "other")
    assert first == again
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {
        "billhook.json",
        *REPORT,
        *(name for name in first if name.endswith(".safetensors") and name in changed),
    }
    assert len(changed) > 1


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_the_batch_size_changes_nothing(place, tmp_path, criterion):
    for name, size in (("one", "1"), ("two", "2")):  # two does not divide five
        prune(place, tmp_path / name, "--criterion", criterion, "--batch-size", size, model="experts")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    different = sum(int(((one[name] == 0) != (two[name] == 0)).sum()) for name in one)
    assert different <= 1e-3 * sum(tensor.numel() for tensor in one.values())


def test_the_layout_is_that_of_the_input(place, pruned):
    before, after = listing(place / "model"), listing(pruned)
    assert set(after) == set(before) | {"billhook.json", *REPORT}
    assert len([name for name in before if name.endswith(".safetensors")]) > 2
    for name, content in before.items():
        if name.endswith(".safetensors"):
            old, new = load_file(place / "model" / name), load_file(pruned / name)
            assert {k: (v.dtype, v.shape) for k, v in old.items()} == {k: (v.dtype, v.shape) for k, v in new.items()}
        else:
            assert after[name] == content, name


def test_only_layers_of_the_plan_change(place, tmp_path):
    prune(place, tmp_path / "pruned", "--ignore", "re:.*self_attn", "--ignore", "model.layers.0", "--sparsity", "0.3")
    before, after = load_model(place / "model"), load_model(tmp_path / "pruned")
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed == {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}


_STOCK = """
import sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "billhook":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    torch.save(model(torch.arange(2 * 24).reshape(2, 24)).logits, folder + ".logits")
assert not any(name.startswith("billhook") for name in sys.modules)
"""


@pytest.mark.nightly
def test_the_output_loads_without_billhook(place, pruned, tmp_path):
    prune(place, tmp_path / "experts", model="experts")
    folders = [str(pruned), str(tmp_path / "experts")]
    ran = subprocess.run([sys.executable, "-c", _STOCK, *folders], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    for folder in folders:
        stored = "bfloat16" if folder == str(pruned) else "float32"  # which stock transformers computes in
        with torch.no_grad():
            logits = load_model(Path(folder), dtype=stored)(IDS).logits
        torch.testing.assert_close(torch.load(f"{folder}.logits"), logits, rtol=1e-6, atol=1e-6)


def test_the_logits_on_disk_are_those_in_memory(place, tmp_path):
    import billhook

    model = load_model(place / "experts")
    tokens = billhook.load_calibration(str(place / "text.txt"), tiny.tokenizer(), samples=5, length=32)
    report = billhook.prune(model, sparsity=0.5, criterion="wanda", calibration=tokens.ids)
    prune(place, tmp_path / "pruned", model="experts")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, load_model(tmp_path / "pruned")(IDS).logits)
    assert report.output is None


def test_an_output_is_replaced_with_overwrite(place, tmp_path):
    prune(place, tmp_path / "pruned", "--criterion", "magnitude", "--sparsity", "0.2")
    prune(place, tmp_path / "pruned", "--criterion", "magnitude", "--sparsity", "0.4", "--overwrite")
    assert json.loads((tmp_path / "pruned" / "billhook.json").read_text())["steps"][0]["plan"]["budget"] == {
        "sparsity": 0.4
    }
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_a_plan_for_other_weights_is_used_with_a_note_and_a_table_is_refused(place, tmp_path):
    tiny.save(tmp_path / "cousin", tiny.llama(seed=1, num_hidden_layers=2))
    table, plan = tmp_path / "table.json", tmp_path / "plan.json"
    done("measure", tmp_path / "cousin", "-o", table)
    given = (
        "prune",
        place / "model",
        "--criterion",
        "magnitude",
        "--sparsity",
        "0.5",
        "--allocator",
        "alphapruning",
        "--table",
        table,
    )
    refused = billhook(*given, "-o", tmp_path / "pruned")
    assert refused.code == 2
    assert "The table is of cousin, whose weights are not those of model." in refused.err
    assert not (tmp_path / "pruned").exists()
    done("plan", table, "--allocator", "alphapruning", "--sparsity", "0.5", "-o", plan)
    done("prune", place / "model", "--plan", plan, "--criterion", "magnitude", "-o", tmp_path / "pruned")
    (step,) = json.loads((tmp_path / "pruned" / "billhook.json").read_text())["steps"]
    assert step["warnings"] == ["The plan was made for the weights of cousin, which are not those of model."]


def test_a_table_of_the_whole_model_is_used_for_some_layers(place, tmp_path):
    done("measure", place / "model", "-o", tmp_path / "table.json")
    options = (
        "--table",
        str(tmp_path / "table.json"),
        "--allocator",
        "alphapruning",
        "--targets",
        "re:.*mlp",
        "--criterion",
        "magnitude",
    )
    report = prune(place, tmp_path / "pruned", *options)
    assert len(report["layers"]) == 6
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_tokens_of_a_file_are_used_as_they_are(place, tmp_path):
    from safetensors.torch import save_file

    save_file({"tokens": IDS.int()}, tmp_path / "tokens.safetensors")
    prune(place, tmp_path / "pruned", "--calibration", str(tmp_path / "tokens.safetensors"))
    facts = json.loads((tmp_path / "pruned" / "billhook.json").read_text())["steps"][0]["made_by"]["calibration"]
    assert (facts["samples"], facts["length"], facts["sampling"]) == (2, 24, "as given")


def test_a_model_without_a_tokenizer_needs_no_text_for_magnitude(tmp_path):
    tiny.save(tmp_path / "model", tiny.llama(num_hidden_layers=2), words=False)
    done("prune", tmp_path / "model", "-o", tmp_path / "pruned", "--sparsity", "0.5", "--criterion", "magnitude")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned") is not None


def test_the_tokenizer_comes_along(pruned):
    assert AutoTokenizer.from_pretrained(pruned)("a b").input_ids[0] == 256
