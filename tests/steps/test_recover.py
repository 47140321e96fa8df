"""Training what is left: zeros stay, the result is better or the input, a stopped run goes on to the same bytes, and
mistakes have one message each."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import bert
import gguf_families
import pytest
import tiny
import torch
import vision_families
from command import contents
from safetensors.torch import load_file, save_file
from transformers import BertModel

from billhook import pack, prune, quantize, recover, verify
from billhook.architectures.layers import find_layers
from billhook.errors import BillhookError, DiskFull, Interrupted, JobError
from billhook.export.gguf import write_gguf
from billhook.recovery import training
from billhook.steps.recover import RecoverRequest, prepare, run
from billhook.steps.recover_blocks import prepare_blocks, run_blocks
from billhook.steps.slim import slim
from billhook.store.checkpoint import model_digest
from billhook.tasks.opening import load_model

pytestmark = pytest.mark.gate
FEW = {"length": 32, "tokens": 6 * 128, "batch_size": 4, "rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a text, a model of words that can be learned, and it pruned, also 2:4, and slimmed."""
    folder = tmp_path_factory.mktemp("recover")
    tiny.text_file(folder / "text.txt", 60)
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=3, intermediate_size=48), dtype=torch.bfloat16)
    about = {"criterion": "magnitude", "allocator": "uniform"}
    prune(folder / "model", output=folder / "pruned", sparsity=0.6, **about)
    prune(folder / "model", output=folder / "half", sparsity=0.5, pattern="2:4", **about)
    text = {"calibration": str(folder / "text.txt"), "samples": 8, "length": 32}
    slim(folder / "model", 0.3, folder / "small", units="blocks", **text)
    return folder


@pytest.fixture(scope="module")
def better(place) -> Path:
    return recover(place / "pruned", place / "better", calibration=str(place / "text.txt"), **FEW).output


def masks(folder: Path) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight == 0 for layer in find_layers(load_model(folder))}


def test_the_result_is_better_every_zero_is_in_its_place_and_the_record_says_how(place, better):
    before, after = masks(place / "pruned"), masks(better)
    assert all(torch.equal(before[name], after[name]) for name in before)
    step = json.loads((better / "billhook.json").read_text())["steps"][-1]
    made_by = step["made_by"]
    assert step["step"] == "recover"
    assert made_by["held_out"]["after"] < made_by["held_out"]["before"]
    assert made_by["lost"]["kl"] < made_by["lost_before"]["kl"]
    assert verify(better).ok
    assert "recover: objective kl+hidden" in (better / "README.md").read_text()
    tensors, old = (load_file(folder / "model.safetensors") for folder in (better, place / "pruned"))
    assert torch.equal(tensors["model.embed_tokens.weight"], old["model.embed_tokens.weight"])
    assert not torch.equal(tensors["model.norm.weight"], old["model.norm.weight"])


def test_a_weight_that_came_back_is_found_in_the_files(place, better):
    shutil.copytree(better, place / "back")
    record = json.loads((place / "back" / "billhook.json").read_text())
    record["steps"][-1]["made_by"]["zeros"]["model.layers.0.mlp.up_proj"] += 1
    (place / "back" / "billhook.json").write_text(json.dumps(record))
    assert any("had values again" in problem for problem in verify(place / "back").problems)


@pytest.mark.parametrize("stop", [1, pytest.param(2, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("objective", ["kl+hidden", pytest.param("mixed", marks=pytest.mark.nightly)])
def test_a_stopped_run_goes_on_to_the_same_bytes(place, tmp_path, stop, objective, monkeypatch):
    monkeypatch.setattr(training, "MEASURED", (2, 2))
    monkeypatch.setattr(training, "SHARES", (0.003, 0.01))
    fields = {**FEW, "calibration": str(place / "text.txt"), "rate": None, "objective": objective}
    left = [stop]

    def stopping() -> bool:
        left[0] -= 1
        return left[0] == 0

    whole = recover(place / "pruned", tmp_path / "whole", teacher=place / "model", **fields)
    job = prepare(RecoverRequest(model=place / "pruned", output=tmp_path / "out", teacher=place / "model", **fields))
    with pytest.raises(Interrupted, match=f"The run is at step {2 * stop} of 6"):
        run(job, stopping=stopping)
    again = {**fields, "teacher": place / "model", "resume": True}
    with pytest.raises(BillhookError, match="cannot be continued: its tune was 'kept"):
        recover(place / "pruned", tmp_path / "out", tune="kept", **again)
    with pytest.raises(BillhookError, match=r"its length was 32, now it is 16\."):  # not that its windows differ
        recover(place / "pruned", tmp_path / "out", **{**again, "length": 16})
    recover(place / "pruned", tmp_path / "out", **again)
    assert contents(tmp_path / "out") == contents(whole.output)


def test_where_nothing_improves_the_input_comes_back(place, tmp_path):
    fields = {**FEW, "calibration": str(place / "text.txt"), "rate": 1e4}
    report = recover(place / "pruned", tmp_path / "out", teacher=place / "model", **fields)
    assert not report.improved
    assert "Nothing improved on what is held out: the output has the weights of the input." in report.warnings
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (place / "pruned" / name).read_bytes()
    assert verify(tmp_path / "out").ok


def test_no_rate_races_that_is_larger_than_a_harmful_one(place, tmp_path):
    fields = {"calibration": str(place / "text.txt"), "teacher": place / "model", **FEW}
    job = prepare(RecoverRequest(model=place / "pruned", output=tmp_path / "out", **fields))
    before, start = job.setup.held_out(), training.values_of(job.setup.trained)
    found = training.race(replace(job.setup, shares=(0.001, 0.01, 1e4, 2e4)), before)
    assert list(found) == [0.001, 0.01, 1e4]
    assert found[1e4] > before > found[0.01]
    assert all(torch.equal(start[name], value) for name, value in training.values_of(job.setup.trained).items())


def test_a_loss_that_is_not_finite_ends_the_run_at_its_best_state(place, tmp_path, monkeypatch):
    before, calls = training.steps_, []

    def broken(*args):
        for loss in before(*args):
            calls.append(loss)
            yield float("nan") if len(calls) == 6 else loss

    monkeypatch.setattr(training, "steps_", broken)
    fields = {**FEW, "calibration": str(place / "text.txt")}
    report = recover(place / "pruned", tmp_path / "out", teacher=place / "model", **fields)
    assert report.improved
    assert "The loss was not finite after step 6: the state of step 5 came back." in report.warnings


@pytest.mark.parametrize("name", ["half", "small"])
def test_patterns_stay_and_slimmed_models_learn_from_the_model_that_was_slimmed(place, tmp_path, name):
    text = str(place / "text.txt")
    report = recover(place / name, tmp_path / "out", teacher=place / "model", calibration=text, **FEW)
    assert report.improved
    assert verify(tmp_path / "out").ok
    assert report.zeros == sum(int(mask.sum()) for mask in masks(place / name).values())
    assert "teacher" in (tmp_path / "out" / "README.md").read_text() or name == "half"


def test_of_a_quantized_model_scales_and_norms_are_trained_and_codes_stay(place, tmp_path):
    quantize(place / "model", "int2/16", tmp_path / "int2", quantizer="round")
    with pytest.raises(BillhookError, match=r'leave out by block, or quantize .* again with recipe="best"'):
        recover(tmp_path / "int2", tmp_path / "out", by="block", calibration=str(place / "text.txt"))
    fields = {**FEW, "calibration": str(place / "text.txt"), "teacher": place / "model"}
    report = recover(tmp_path / "int2", tmp_path / "out", **fields)
    assert report.improved
    before, after = ({}, {})
    for folder, found in ((tmp_path / "int2", before), (tmp_path / "out", after)):
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "weight"}
    assert all("norm" in name for name in changed if not name.endswith("scale"))
    assert verify(tmp_path / "out").ok
    ours = load_model(tmp_path / "out", quantized=True)
    assert report.to_json()["zeros"] == sum(int((layer.weight == 0).sum()) for layer in find_layers(ours))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int2", "out"]
    chosen = {"targets": "re:.*(q|k)_proj", "ignore": "re:.*k_proj", "tune": "kept"}
    recover(tmp_path / "int2", tmp_path / "part", **chosen, **fields)
    part = {
        name: value for file in (tmp_path / "part").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert {name.split(".")[-2] for name in part if not torch.equal(before[name], part[name])} == {"q_proj"}


@pytest.mark.nightly
@pytest.mark.parametrize("stop", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_block_by_block_zeros_stay_and_a_stopped_run_goes_on_to_the_same_bytes(place, tmp_path, stop):
    fields = {"calibration": str(place / "text.txt"), "teacher": place / "model", "length": 32, "by": "block"}
    fields |= {"tokens": 16 * 32}
    whole = recover(place / "pruned", tmp_path / "whole", **fields)
    assert whole.loss.kl < whole.lost_before.kl
    before, after = masks(place / "pruned"), masks(whole.output)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert verify(whole.output).ok
    left = [stop]

    def stopping() -> bool:
        left[0] -= 1
        return left[0] == 0

    job = prepare_blocks(RecoverRequest(model=place / "pruned", output=tmp_path / "out", **fields))
    with pytest.raises(Interrupted, match=f"{stop} of 3 blocks are finished"):
        run_blocks(job, stopping=stopping)
    recover(place / "pruned", tmp_path / "out", resume=True, **fields)
    assert contents(tmp_path / "out") == contents(whole.output)
    with pytest.raises(BillhookError, match="differ in shape"):
        recover(place / "small", tmp_path / "no", **fields)


@pytest.mark.parametrize("by", ["model", pytest.param("block", marks=pytest.mark.nightly)])
def test_layers_that_no_plan_names_are_trained_and_no_part_of_the_report_of_pruning(place, tmp_path, by):
    about = {"criterion": "magnitude", "allocator": "uniform", "sparsity": 0.5}
    prune(place / "model", output=tmp_path / "part", ignore="re:.*down_proj", **about)
    fields = {"length": 32, "tokens": 512, "by": by, **({"rate": 0.01} if by == "model" else {})}
    text = {"calibration": str(place / "text.txt"), "teacher": place / "model"}
    recover(tmp_path / "part", tmp_path / "out", **fields, **text)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("part", "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any("down_proj" in name for name in changed)
    assert verify(tmp_path / "out").ok
    before, after = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("part", "out"))
    assert after["achieved"] == before["achieved"]
    prune(tmp_path / "out", output=tmp_path / "again", ignore="re:.*(down|up)_proj", **{**about, "sparsity": 0.6})
    assert verify(tmp_path / "again").ok


NO_EFFECT = {"objective": "kl", "options": {"weight": 1}, "batch_size": 4, "checkpointing": True, "rate": 0.1}
NO_EFFECT |= {"budget": "1m", "recipe": "atp-lora", "tune": "adapters"}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_block_by_block_what_has_no_effect_is_refused(place, tmp_path, name):
    given = {"options": "weight", "tune": "tune adapters"}.get(name, name)
    with pytest.raises(BillhookError, match=f"where one block at a time is tuned: {given}. Leave them out"):
        recover(place / "pruned", tmp_path / "out", by="block", calibration="x", **{name: NO_EFFECT[name]})


@pytest.mark.parametrize("tune", ["kept", pytest.param("kept+norms", marks=pytest.mark.nightly)])
def test_block_by_block_only_the_chosen_layers_are_tuned_on_as_many_windows_as_there_are(place, tmp_path, tune):
    (tmp_path / "short.txt").write_text((place / "text.txt").read_text()[:1000])
    fields = {"calibration": str(tmp_path / "short.txt"), "teacher": place / "model", "length": 16, "by": "block"}
    chosen = {"targets": "re:.*(q|k)_proj", "ignore": "model.layers.1"}
    recover(place / "pruned", tmp_path / "out", tune=tune, **chosen, **fields)
    old, new = (load_file(folder / "model.safetensors") for folder in (place / "pruned", tmp_path / "out"))
    changed = {name.removeprefix("model.layers.") for name in old if not torch.equal(old[name], new[name])}
    layers = {f"{block}.self_attn.{name}_proj.weight" for block in (0, 2) for name in "qk"}
    assert {name for name in changed if "norm" not in name} == layers
    assert any("norm" in name for name in changed) == (tune == "kept+norms")
    made_by = json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"][-1]["made_by"]
    assert (made_by["targets"], made_by["ignore"]) == ([chosen["targets"]], [chosen["ignore"]])
    assert made_by["calibration"]["samples"] < 80


@pytest.mark.parametrize("by", ["model", pytest.param("block", marks=pytest.mark.nightly)])
def test_a_packed_model_is_trained_unpacked(place, tmp_path, by):
    pack(place / "pruned", tmp_path / "packed")
    fields = {"length": 32, "tokens": 768} if by == "block" else FEW
    fields = {**fields, "calibration": str(place / "text.txt"), "teacher": place / "model", "by": by}
    report = recover(tmp_path / "packed", tmp_path / "out", **fields)
    assert report.loss.kl < report.lost_before.kl
    assert verify(tmp_path / "out").ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed"]


@pytest.mark.parametrize("objective", ["kl+hidden", pytest.param("text", marks=pytest.mark.nightly)])
def test_every_task(place, tmp_path, objective):
    bert.save(tmp_path / "fill-mask")
    (tmp_path / "pruned").mkdir()
    (tmp_path / "out").mkdir()
    vision_families.build("vit").save_pretrained(tmp_path / "image-classification")
    encoder = BertModel(bert.model().config)
    encoder.load_state_dict(bert.model().bert.state_dict(), strict=False)
    encoder.save_pretrained(tmp_path / "feature-extraction")
    bert.tokenizer().save_pretrained(tmp_path / "feature-extraction")
    images = {"pixel_values": torch.randn(20, 3, 32, 32), "labels": torch.arange(20) % 10}
    text = {"calibration": str(place / "text.txt"), "length": 32}
    for task in ("fill-mask", "image-classification", "feature-extraction"):
        given = {"calibration": images} if task == "image-classification" else text
        options = {"criterion": "magnitude", "allocator": "uniform", "sparsity": 0.5}
        prune(tmp_path / task, output=tmp_path / "pruned" / task, **options)
        fields = {"teacher": tmp_path / task, "tokens": 600, "batch_size": 4, "rate": 0.01, **given}
        if (task, objective) == ("feature-extraction", "text"):
            with pytest.raises(BillhookError, match="needs labels"):
                recover(tmp_path / "pruned" / task, tmp_path / "no", objective=objective, **fields)
            continue
        report = recover(tmp_path / "pruned" / task, tmp_path / "out" / task, objective=objective, **fields)
        assert report.improved, task
        assert verify(report.output).ok


@pytest.mark.nightly
def test_a_time_is_turned_into_tokens_once(place, tmp_path):
    fields = {**FEW, "calibration": str(place / "text.txt"), "tokens": None, "budget": "2s"}
    job = prepare(RecoverRequest(model=place / "pruned", output=tmp_path / "out", teacher=place / "model", **fields))
    assert job.tokens == 128 * job.setup.steps
    report = run(job)
    record = json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"][-1]["made_by"]
    assert (record["tokens"], record["budget"]) == (report.tokens, "2s") == (128 * report.state.steps, "2s")


def test_norms_keep_the_dtype_of_their_own_tensors_and_a_recipe_can_be_followed_in_part(place, tmp_path):
    mixed = shutil.copytree(place / "pruned", tmp_path / "mixed")
    tensors = load_file(mixed / "model.safetensors")
    save_file({n: t.float() if t.ndim == 1 else t for n, t in tensors.items()}, mixed / "model.safetensors")
    (mixed / "billhook.json").unlink()
    fields = {**FEW, "calibration": str(place / "text.txt"), "teacher": place / "model"}
    job = prepare(RecoverRequest(model=mixed, output=tmp_path / "out", recipe="atp-lora", tune="kept+norms", **fields))
    assert {(kept.parameter.ndim, kept.stored) for kept in job.setup.trained} == {
        (1, torch.float32),
        (2, torch.bfloat16),
    }


def unknown(place: Path) -> Path:
    """The pruned model without its history; that there is no dense model is said before text is read or written."""
    folder = shutil.copytree(place / "pruned", place / "unknown")
    (folder / "billhook.json").unlink()
    return folder


def mistakes(place: Path) -> dict[str, tuple[dict, str]]:
    other = tiny.save(place / "other", tiny.llama(7, num_hidden_layers=3, intermediate_size=48))
    (place / "short.txt").write_text("too short")
    return {
        "dense": ({"model": place / "model"}, "is dense and has no history: there are no zeros to keep and no model"),
        "itself": ({"model": place / "model", "teacher": place / "model"}, "is its own dense model"),
        "another": ({"teacher": other}, "is not the model that .* was made from .* its digest differs"),
        "short": ({"calibration": str(place / "short.txt")}, "short.txt has only 1 windows|is too short"),
        "large step": (
            {"batch_size": 1000},
            "trains on at least 1000. Give more text, or a smaller length or batch_size",
        ),
        "no teacher": (
            {"model": unknown(place), "calibration": "self:none"},
            "the objective kl.hidden needs one: name",
        ),
        "both": ({"budget": "1m"}, "either tokens or a time with budget"),
        "time": ({"budget": "soon", "tokens": None}, "soon is no time: write 90s, 10m or 2h"),
        "objective": ({"objective": "lk"}, "Unknown objective 'lk'. Did you mean 'kl'"),
        "option": ({"options": {"weigth": 1}}, "has no option 'weigth'. Did you mean 'weight'"),
        "no text": ({"calibration": None}, "Recovering needs"),
        "tune": ({"tune": "all"}, "tune='all' must be one of"),
    }


CASES = ("dense", "itself", "another", "short", "large step", "no teacher", "both", "time", "objective", "option")
CASES += ("no text", "tune")


@pytest.fixture(scope="module")
def wrong(place):
    return mistakes(place)


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_message_and_nothing_is_written(place, tmp_path, wrong, case):
    changes, message = wrong[case]
    fields = {"model": place / "pruned", "calibration": str(place / "text.txt"), **FEW, **changes}
    with pytest.raises(BillhookError, match=message):
        recover(output=tmp_path / "out", **fields)
    assert not list(tmp_path.iterdir())


def test_a_gguf_is_named_as_it_was_given_and_not_as_the_directory_that_was_made_of_it(place, tmp_path):
    file = tmp_path / "file.gguf"
    write_gguf(gguf_families.save(tmp_path / "model", "llama", num_hidden_layers=1), file, rest="q8_0")
    with pytest.raises(BillhookError, match=f"^{re.escape(str(file))} .*has no history"):
        recover(file, tmp_path / "out", calibration=str(place / "text.txt"), **FEW)


def test_another_tokenizer_and_a_teacher_that_moved_are_refused_or_asked_for(place, tmp_path):
    fields = {"calibration": str(place / "text.txt"), **FEW}
    moved = shutil.copytree(place / "pruned", tmp_path / "moved" / "pruned")
    with pytest.raises(BillhookError, match=r"The dense model of .* model with the digest .* name it with teacher"):
        recover(moved, tmp_path / "out", **fields)
    alone = recover(moved, tmp_path / "alone", objective="text", **fields)  # which needs no dense model
    assert alone.loss is None
    assert verify(alone.output).ok
    other = shutil.copytree(place / "model", tmp_path / "model")
    text = (other / "tokenizer.json").read_text().replace('"</s>"', '"<end>"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(BillhookError, match="its tokenizer differs"):
        recover(place / "pruned", tmp_path / "out", teacher=other, **fields)


def test_a_disk_that_is_full_at_the_end_loses_nothing_and_the_teacher_stays_the_same(place, tmp_path, monkeypatch):
    pruned, fields = shutil.copytree(place / "pruned", tmp_path / "pruned"), {"calibration": str(place / "text.txt")}
    (pruned / "billhook.json").unlink()
    other = tiny.save(tmp_path / "other", tiny.llama(7, num_hidden_layers=3, intermediate_size=48))

    def full(*args):
        raise DiskFull("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr("billhook.steps.recover._write", full)
        with pytest.raises(Interrupted, match=r"The disk is full\. The run is at step 6 of 6 .* resume=True"):
            recover(pruned, tmp_path / "out", teacher=place / "model", **FEW, **fields)
    with pytest.raises(BillhookError, match="cannot be continued: its teacher was"):
        recover(pruned, tmp_path / "out", teacher=other, resume=True, **FEW, **fields)
    report = recover(pruned, tmp_path / "out", teacher=place / "model", resume=True, **FEW, **fields)
    made_by = json.loads((tmp_path / "out" / "billhook.json").read_text())["steps"][0]["made_by"]
    assert made_by["teacher"] == {"name": None, "digest": model_digest(place / "model")}
    assert (made_by["tokens"], report.state.steps) == (6 * 128, 6)


def test_weights_that_become_zero_are_noted_so_that_the_plan_of_pruning_still_holds(place, tmp_path, monkeypatch):
    def underflowing(setup, *args, **options):
        done = training.train_(setup, *args, **options)
        kept = next(k for k in setup.trained if k.name.endswith("up_proj.weight"))
        kept.restore_(kept.values().index_fill(0, torch.arange(5), 0.0))
        return done

    monkeypatch.setattr("billhook.steps.recover.train_", underflowing)
    fields = {**FEW, "calibration": str(place / "text.txt"), "teacher": place / "model"}
    report = recover(place / "pruned", tmp_path / "out", **fields)
    assert report.zeros == 5 + sum(int(mask.sum()) for mask in masks(place / "pruned").values())
    assert verify(tmp_path / "out").problems == []


def test_a_model_in_memory_is_refused(place, tmp_path):
    with pytest.raises(BillhookError, match="works on a directory, got LlamaForCausalLM"):
        recover(load_model(place / "pruned"), tmp_path / "out", calibration=str(place / "text.txt"), **FEW)


def test_a_streamed_teacher_and_gradient_checkpointing_change_no_bit(place, better, tmp_path, monkeypatch):
    monkeypatch.setattr("billhook.steps.recover.teacher_fits", lambda path, opened: False)
    fields = {**FEW, "calibration": str(place / "text.txt"), "teacher": place / "model"}
    report = recover(place / "pruned", tmp_path / "out", checkpointing=True, **fields)
    assert "it is read one block at a time, in every step" in report.warnings[0]
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (better / name).read_bytes()


def test_too_little_memory_is_said_before_anything_is_written(place, tmp_path, monkeypatch):
    monkeypatch.setattr("billhook.steps.recover_setup.free_gib", lambda device: 1e-6)
    with pytest.raises(JobError, match="GiB beside the models, and"):
        recover(place / "pruned", tmp_path / "out", calibration=str(place / "text.txt"), **FEW)
    assert not list(tmp_path.iterdir())


def test_it_says_where_whole_steps_take_more_tokens_than_were_asked_for(place):
    few = {"calibration": str(place / "text.txt"), "length": 32, "batch_size": 4, "rate": 0.01}

    def notes(tokens: int) -> str:
        return " ".join(prepare(RecoverRequest(place / "pruned", place / "new", tokens=tokens, **few)).notes)

    assert "Trains on 128 tokens instead of 10: a step has 128 of them (--batch-size)." in notes(10)
    assert "instead of" not in notes(6 * 128)
