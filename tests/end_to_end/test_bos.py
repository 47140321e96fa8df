"""Windows begin with the BOS token in every command that reads text, by one rule that is recorded."""

import json

import pytest
import tiny
import torch
from command import billhook, done
from documents import jsonl
from resuming import whole_and_in_parts
from safetensors import safe_open

from billhook import load_model
from billhook.errors import Interrupted
from billhook.evaluation.scoring import IGNORED
from billhook.steps.prune import prepare, run
from billhook.steps.prune_job import PruneRequest
from billhook.steps.request import open_request
from billhook.store.record import history
from billhook.tasks.opening import task_of
from billhook.trials.heldout import split_samples

pytestmark = pytest.mark.gate
TEXT = ("--calibration", "text.jsonl", "--samples", "6", "--length", "32")
HABITS = [((), True), (("--bos", "no"), False), (("--bos", "yes"), True), (("--published",), False)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    jsonl(tmp_path / "text.jsonl", [f"{number} {tiny.TEXT}" for number in range(60)])
    return tmp_path


@pytest.mark.nightly
@pytest.mark.parametrize(("options", "begun"), HABITS, ids=["auto", "no", "yes", "published"])
def test_every_command_follows_one_rule_and_records_it(place, options, begun):
    published = "--published" in options
    sparsity = ("--sparsity", "0.5")
    done("measure", "model", "--metrics", "outlier_ratio:5", *TEXT, *options, "-o", "table.json")
    done("gradients", "model", *TEXT, *options, "-o", "g.safetensors")
    done("prune", "model", *sparsity, *TEXT, *options, "-o", "pruned")
    done("quantize", "model", "--type", "int8", *TEXT, *options, "-o", "small")
    grid = ("--sparsities", "0.5", "--data", "text.jsonl", "--limit", "4", "-o", "grid")
    done("compare", "model", *grid, *TEXT, *options)
    with safe_open("g.safetensors", framework="pt") as file:
        gradients = json.loads(file.metadata()["about"])["calibration"]
    compared = json.loads((place / "grid" / "compare.json").read_text())
    found = {
        "measure": json.loads((place / "table.json").read_text())["made_by"]["calibration"]["bos"],
        "gradients": gradients["bos"],
        "prune": history(place / "pruned").steps[0].made_by["calibration"]["bos"],
        "report": json.loads((place / "pruned" / "report.json").read_text())["calibration"]["bos"],
        "compare": compared["identity"]["calibration"]["bos"],
        "quantize": history(place / "small").steps[0].made_by["calibration"]["bos"],
        "compare, scored": compared["identity"]["data"]["bos"],
    }
    if not published:  # neither of them has --published
        scored = done(
            "eval", "pruned", "--data", "text.jsonl", "--length", "32", "--protocol", "both", *options, "--json"
        )
        found |= {"eval": scored.json["bos"], "words": scored.json["word"]["bos"]}
        done("search", "model", *sparsity, *TEXT, *options, "--allocator", "atp", "--budget", "1", "-o", "found")
        searched = json.loads((place / "found" / "search.json").read_text())["identity"]["calibration"]
        found |= {"search": searched["bos"]}
    assert found == dict.fromkeys(found, begun)
    assert ("each window after BOS" in (place / "pruned" / "README.md").read_text()) == begun


@pytest.mark.nightly
def test_a_run_that_begins_windows_otherwise_is_not_continued(place):
    fields = {"sparsity": 0.5, "calibration": "text.jsonl", "samples": 6, "length": 32, "output": place / "out"}
    with pytest.raises(Interrupted):
        run(prepare(PruneRequest(place / "model", **fields)), stopping=lambda: True)
    refused = billhook("prune", "model", "--sparsity", "0.5", *TEXT, "--bos", "no", "--resume", "-o", "out")
    assert refused.code == 2
    assert "its calibration was" in refused.err
    done("prune", "model", "--sparsity", "0.5", *TEXT, "--bos", "yes", "--resume", "-o", "out")


def test_runs_scored_with_and_without_bos_are_not_shown_side_by_side(place):
    for name, bos in (("one", "yes"), ("other", "no")):
        done("prune", "model", "--sparsity", "0.5", "--criterion", "magnitude", "-o", name)
        done("eval", name, "--data", "text.jsonl", "--length", "32", "--bos", bos, "--report")
    refused = billhook("compare", "--runs", "one", "other")
    assert refused.code == 2
    assert "only in one, windows begin with a BOS token" in refused.err


@pytest.mark.parametrize("source", ["text.jsonl", "self:", "self:text.jsonl"])
def test_bos_is_never_predicted_in_trials(place, source):
    """Documents are shorter than a window, so that BOS tokens are inside windows, too."""
    model = load_model(place / "model")
    model.config.eos_token_id = model.generation_config.eos_token_id = list(range(200))  # so that documents end
    request = PruneRequest(model, 0.5, calibration=source, samples=70, length=64)
    samples = open_request(request, True, "A test").samples
    assert (samples.batch["input_ids"][:, 0] == 256).all()
    assert (samples.batch["input_ids"][:, 1:] == 256).any()
    heldout = split_samples(model, samples, 8, 0).heldout
    _, labels = task_of(model).scored(torch.zeros(*heldout["input_ids"].shape, 1), heldout)
    assert torch.equal(labels == IGNORED, heldout["input_ids"][:, 1:] == 256)


def test_a_resumed_run_on_its_own_text_finds_the_same_loss(place):
    """Its stored windows have BOS tokens, which are not predicted then either."""
    fields = {"sparsity": 0.5, "recipe": "fast", "calibration": "self:text.jsonl", "samples": 8, "length": 64}
    whole_and_in_parts(place / "model", place, 1, **fields)
    one, other = (history(place / name).steps[0].made_by for name in ("whole", "parts"))
    assert one["lost"] == other["lost"]
    assert one["calibration"] == other["calibration"]


def test_an_option_without_use_is_refused(place):
    (place / "items.jsonl").write_text(json.dumps({"requests": [["a", "b"], ["a", "c"]], "gold": 0}) + "\n")
    assert "--bos is for --data" in billhook("eval", "model", "--tasks", "items.jsonl", "--bos", "no").err
