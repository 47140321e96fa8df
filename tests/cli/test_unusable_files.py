"""Plans, tables and texts that cannot be used: what is wrong, where, and what to do, with nothing written."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from command import MAGNITUDE, PRUNE, TEXT, UP, edit, refused
from safetensors.torch import save_file


def planned(**sparsity: object) -> tuple[str, ...]:
    """Change layers of plan.json (None takes one out) and prune with it."""
    layers = json.loads(Path("plan.json").read_text())["weights"]
    edit("plan.json", weights={name: s for name, s in (layers | sparsity).items() if s is not None})
    return (*MAGNITUDE, "--plan", "plan.json")


def test_a_plan_for_another_model(place):
    tiny.save(place / "deeper", tiny.llama(num_hidden_layers=3))
    message = r"not for this model: 7 of its layers are not in the plan and 0 .*first: model\.layers\.2"
    refused(place, "prune", "deeper", *MAGNITUDE[2:], "--plan", "plan.json", match=message)


def test_a_plan_with_a_missing_layer_is_refused(place):
    refused(place, *planned(**{UP: None}), match=rf"1 of its layers are not in the plan .*first: {UP}")


def test_a_plan_with_an_extra_layer_is_refused(place):
    refused(
        place,
        *planned(**{f"{UP}x": 0.5}),
        match=rf"1 of the plan's are not in the model \(first: {UP}x\)\. Did you mean '{UP}'\?",
    )


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), 1.5, -0.5, "0.5", None, True, 10**400], ids=lambda value: repr(value)[:8]
)
def test_a_plan_with_impossible_entries_is_refused(place, bad):
    layers = json.loads(Path("plan.json").read_text())["weights"]
    edit("plan.json", weights=layers | {UP: bad})
    refused(
        place,
        *MAGNITUDE,
        "--plan",
        "plan.json",
        match=rf"plan\.json: {UP}: (A sparsity must be a number in \[0, 1\], got |Unknown storage type '0\.5')"
        r"|plan\.json is not a plan: it is not valid json \(.* is not a finite number\)",
    )


def test_a_plan_whose_groups_do_not_fit_is_refused(place):
    refused(place, *planned(**{UP: "2:5"}), match=rf"2:5 is impossible for {UP}: its 32 columns do not divide by 5")


def test_a_plan_that_pruning_cannot_apply_is_refused(place):
    refused(
        place, *planned(**{UP: "q4_0"}), match=r"This plan stores layers as q4_0: billhook prune applies sparsities"
    )


def test_files_that_are_no_plan_are_refused(place):
    refused(place, *MAGNITUDE, "--plan", "nowhere.json", match=r"There is no plan at nowhere\.json")
    refused(place, *MAGNITUDE, "--plan", "text.txt", match=r"text\.txt is not a plan: it is not valid json")
    refused(place, *MAGNITUDE, "--plan", "table.json", match=r"table\.json: 'sparsity' must be an object")


def test_options_that_a_plan_already_decides_are_refused(place):
    refused(
        place,
        *MAGNITUDE,
        "--plan",
        "plan.json",
        "--sparsity",
        "0.5",
        match="A plan already gives the sparsity of each layer: leave out",
    )
    message = r"--targets and --ignore must choose exactly the plan's layers"
    refused(place, *MAGNITUDE, "--plan", "plan.json", "--ignore", UP, match=message)


def test_a_table_of_another_model_is_refused(place):
    edit("table.json", model={})  # as of a model in memory, whose digest is not known
    tiny.save(place / "wider", tiny.llama(num_hidden_layers=2, intermediate_size=96))
    command = ("--sparsity", "0.5", "--table", "table.json")
    refused(
        place,
        "prune",
        "wider",
        *MAGNITUDE[2:],
        *command,
        match=r"not of this model: .*gate_proj.* 64 x 32.* 96 x 32 in the model",
    )
    tiny.save(place / "shallower", tiny.llama(num_hidden_layers=1))
    refused(
        place,
        "prune",
        "shallower",
        *MAGNITUDE[2:],
        *command,
        match=r"not of this model: model\.layers\.1.* is not in the model",
    )
    tiny.save(place / "deeper", tiny.llama(num_hidden_layers=3))
    refused(place, "prune", "deeper", *MAGNITUDE[2:], *command, match=r"model\.layers\.2")


def test_a_table_without_the_needed_column_is_refused(place):
    command = ("--sparsity", "0.5", "--table", "table.json", "--allocator", "owl")
    message = r"no column 'outlier_ratio:5'.* Make it with: billhook measure MODEL --metrics outlier_ratio:5"
    refused(place, *MAGNITUDE, *command, match=message)
    refused(place, "plan", "table.json", *command[:2], *command[4:], match=message)


@pytest.mark.parametrize(
    "name, content, match",
    [
        ("empty.txt", "", r"empty\.txt is empty: give a text with something in it"),
        ("blank.txt", " \n\n", r"blank\.txt is empty"),
        (
            "short.txt",
            "Only this.",
            r"short\.txt is too short: 4 windows of 32 need 128 tokens, it has \d+ .*smaller --samples or --length",
        ),
        ("none.jsonl", "", r"none\.jsonl is empty"),
        ("other.jsonl", '{"content": "x"}\n', r"other\.jsonl, line 1 has no field `text`"),
        ("broken.jsonl", '{"text": "x"}\n{', r"broken\.jsonl, line 2 is not valid json"),
        ("notes.md", "Some text", r"Unknown text source 'notes\.md'\. The forms are"),
        ("fake.safetensors", "no", r"fake\.safetensors is not a safetensors file"),
    ],
)
def test_unusable_texts_are_refused(place, name, content, match):
    Path(name).write_text(content)
    refused(place, *PRUNE[:6], "--calibration", name, *TEXT[2:], match=match)


def test_missing_texts_are_refused(place):
    refused(place, *PRUNE[:6], "--calibration", "texts.txt", match=r"There is no file texts\.txt")
    refused(place, *PRUNE[:6], "--calibration", "stdlib:all", match="use stdlib:train or stdlib:heldout")
    refused(place, "eval", "model", "--data", "texts.txt", match=r"There is no file texts\.txt")


def test_documents_shorter_than_a_window_are_refused(place):
    Path("short.jsonl").write_text('{"text": "short"}\n' * 50)
    message = r"No document of short\.jsonl is longer than 32 tokens"
    refused(place, *PRUNE[:6], "--calibration", "short.jsonl", *TEXT[2:], "--published", match=message)


def test_windows_longer_than_the_context_are_refused(place):
    refused(
        place,
        *PRUNE,
        "--length",
        "500",
        match=r"Windows of 500 tokens exceed the model's context of 128: use --length 128",
    )


@pytest.mark.parametrize("bad", [-1, 258, 10**9])
def test_token_ids_outside_the_vocabulary_are_refused(place, bad):
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    tokens[2, 7] = bad
    save_file({"tokens": tokens}, "tokens.safetensors")
    message = rf"tokens\.safetensors: token id {bad} at row 2, position 7 is outside the vocabulary"
    refused(place, *PRUNE[:6], "--calibration", "tokens.safetensors", match=message)
    refused(place, "eval", "model", "--data", "tokens.safetensors", match=message)


def test_text_without_a_tokenizer_is_refused(place):
    for file in Path("model").glob("tokenizer*"):
        file.unlink()
    refused(place, *PRUNE, match=r"The model has no tokenizer to read text\.txt with: give a \.safetensors file")
