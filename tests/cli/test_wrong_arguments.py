"""Mistakes and failures through the command line: what, where and what to do in one or two lines, the right exit code,
nothing left."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from command import done, refused
from safetensors.torch import load_file, save_file

TEXT = ("--calibration", "text.txt", "--samples", "4", "--length", "32")
PRUNE = ("prune", "model", "--output", "pruned", "--sparsity", "0.5", *TEXT)
SEARCH = ("search", "model", "--sparsity", "0.5", "--output", "found", *TEXT)
MAGNITUDE = ("prune", "model", "--output", "pruned", "--criterion", "magnitude")
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def edit(path: str, **changes: object) -> None:
    """Change entries of a json file."""
    content = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps(content | changes))


def test_what_is_in_order_is_not_refused(place):
    assert done(*PRUNE, "--json").json["sparsity"] == 0.5


# Models


def test_a_model_path_that_does_not_exist(place):
    refused(
        place,
        "prune",
        "modell",
        *PRUNE[2:],
        match=r"no model directory at modell\. Give an existing directory or a hub name",
    )
    refused(place, "measure", "./no/model", "-o", "t.json", match=r"no model directory at \./no/model")
    refused(place, "eval", "modell", "--data", "text.txt", match="no model directory at modell")


def test_a_directory_without_a_configuration(place):
    (place / "model" / "config.json").unlink()
    refused(place, *PRUNE, match=r"model has no config\.json: give the directory of a Hugging Face model")


def test_a_file_where_a_directory_is_needed(place):
    refused(place, "prune", "model/config.json", *PRUNE[2:], match="is a file: give the model directory")


def test_pickled_weights(place):
    torch.save({}, "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    refused(place, *PRUNE, match=r"pickled weights \(pytorch_model\.bin\).*Convert them.*save_pretrained")


def test_missing_and_damaged_weights(place):
    weights = Path("model/model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    refused(
        place,
        *PRUNE,
        match=r"model\.safetensors holds .* bytes where its header promises .*: copy or download it again",
    )
    weights.unlink()
    refused(place, *PRUNE, match=r"no model\.safetensors .*the weights are missing")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(place, bad):
    weights = load_file("model/model.safetensors")
    weights[f"{UP}.weight"][3, 5] = bad
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused(place, *PRUNE, match=rf"{UP}\.weight holds 1 NaN or infinite weights: repair the checkpoint")
    refused(place, "measure", "model", "-o", "other.json", match=rf"{UP}\.weight holds 1 NaN")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"]
)
def test_weights_outside_the_layers_that_are_not_finite(place, name):
    weights = load_file("model/model.safetensors")
    weights[name][..., 2] = float("nan")
    save_file(weights, "model/model.safetensors", metadata={"format": "pt"})
    refused(place, *PRUNE, match=rf"{name} holds \d+ NaN or infinite weights")
    refused(place, "generate", "model", "a", match="predictions are NaN", code=1)


def test_a_quantization_config_of_null_is_none(place):
    edit("model/config.json", quantization_config=None)
    done(*PRUNE, "--dry-run")


def test_another_kind_of_model(place):
    edit("model/config.json", architectures=["ViTForImageClassification"], model_type="vit")
    refused(place, *PRUNE, match="model is ViTForImageClassification: only models for text-generation and fill-mask")


def test_weights_that_do_not_fit_the_configuration(place):
    edit("model/config.json", intermediate_size=96)
    refused(
        place,
        *PRUNE,
        match=r"does not fit its config\.json: the tensor model\.layers\.0\.mlp\.down_proj\.weight has another shape",
    )


# Names and options


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            (*PRUNE, "--criterion", "wnada"),
            r"Unknown criterion 'wnada'\. Did you mean 'wanda'\? There are: magnitude, wanda, ",
        ),
        (
            (*PRUNE, "--allocator", "alphaprune"),
            r"Unknown allocator 'alphaprune'\. Did you mean 'alphapruning'\? There are: uniform, ",
        ),
        (
            ("plan", "table.json", "--allocator", "alpha", "--sparsity", "0.5"),
            r"Unknown allocator 'alpha'\. Did you mean 'alphapruning'\?",
        ),
        (
            ("measure", "model", "-o", "t.json", "--metrics", "alpha_peek"),
            r"Unknown metric 'alpha_peek'\. Did you mean 'alpha_peak'\? There",
        ),
        (("measure", "model", "-o", "t.json", "--metrics", ","), "--metrics names none: give one, such as alpha_peak"),
        (("measure", "model", "-o", "t.json", "--metrics", "outlier_ratio:zero", *TEXT), r"outlier_ratio.*zero"),
        (
            (*PRUNE, "--allocator", "alphapruning", "--set", "metric=alpha_pack"),
            r"Unknown metric 'alpha_pack'\. Did you mean 'alpha_peak'\?",
        ),
        (
            (*PRUNE, "--allocator", "alphapruning", "--set", "epsilom=0.3"),
            r"option 'epsilom'\. Did you mean 'epsilon'\? Their options: ",
        ),
        ((*PRUNE, "--criterion", "sparsegpt", "--set", "damp=0.1"), r"option 'damp'\. Did you mean 'damping'\?"),
        (
            (*PRUNE, "--allocator", "alphapruning", "--set", "epsilon=lots"),
            r"epsilon='lots' is not a valid float \(default 0\.3\)",
        ),
        ((*PRUNE, "--allocator", "alphapruning", "--set", "epsilon=2"), r"epsilon must be in \[0, 1\], got 2"),
        ((*PRUNE, "--allocator", "alphapruning", "--set", "epsilon=-0.1"), r"epsilon must be in \[0, 1\], got -0\.1"),
        ((*PRUNE, "--allocator", "sensitivity", "--set", "epsilon=-0.1"), r"epsilon must be in \[0, 1\], got -0\.1"),
        (
            (*PRUNE[:4], *TEXT, "--preset", "owl/lama@70"),
            r"Unknown preset 'owl/lama@70'\. Did you mean 'owl/llama@70'\? See: billhook ls",
        ),
        (
            (*SEARCH, "--budget", "0"),
            r"A budget of zero finds nothing: give at least one trial \(--budget 1\), or some minutes",
        ),
        ((*SEARCH, "--budget", "0m"), r"A budget of zero finds nothing"),
        (
            (*SEARCH, "--budget", "soon"),
            r"The budget 'soon' is neither a number of trials, such as 9, nor of minutes, such as 5m",
        ),
        (
            (*SEARCH, "--allocator", "atp", "--set", "beta=0.1"),
            r"beta is what the search chooses for atp: leave out --set beta",
        ),
        (
            (*SEARCH, "--set", "damping=0.1"),
            r"Neither allocator 'alphapruning' or 'atp'.* nor criterion 'wanda' has an option 'damping'",
        ),
        ((*SEARCH, "--samples", "3"), r"3 different windows are too few to split into calibration and held-out ones"),
        (
            (*SEARCH[:5], "model/found", *SEARCH[6:]),
            r"The output .*found contains the source model .*model or is inside it",
        ),
        (
            (*PRUNE, "--allocator", "atp", "--set", "beta=3"),
            r"ATP's beta must be in \[0, 1\] for 2 blocks at sparsity 0\.5, got 3",
        ),
        ((*PRUNE, "--set", "epsilon"), r"--set epsilon: write KEY=VALUE"),
        ((*PRUNE, "--allocator", "owl", "--set", "lam=0.1", "--set", "lam=0.2"), "--set lam is given twice"),
        (("ls", "allocator"), r"Unknown kind 'allocator'\. Did you mean 'allocators'\? There are: "),
        (("prnue", "model"), r"No such command 'prnue'.*See: billhook --help"),
        (("prune",), r"Missing argument.*See: billhook prune --help"),
        ((*PRUNE, "--sparcity", "0.5"), r"No such option: --sparcity.*--sparsity"),
        ((*PRUNE, "--group", "column"), r"--group"),
        ((*PRUNE, "--dtype", "int8"), r"--dtype"),
        ((*PRUNE, "--device", "gpu"), r"Cannot put the model on device 'gpu'"),
        ((*PRUNE, "--samples", "0"), r"--samples"),
        (
            (*PRUNE[:3], "pruned", "--sparsity", "0.5"),
            r"needs activations: give text .* with --calibration FILE\.txt",
        ),
        (("prune", "model", "--sparsity", "0.5", *TEXT), r"--output DIRECTORY \(or --dry-run"),
        (("eval", "model"), r"Say what to score: --data FILE\.txt"),
        (("verify", "model"), r"no record of a pruned model at model/billhook\.json"),
    ],
    ids=lambda value: value.split(r"\.")[0][:40] if isinstance(value, str) else "",
)
def test_unknown_names_and_options(place, arguments, match):
    refused(place, *arguments, match=match)


@pytest.mark.parametrize("sparsity", ["1", "1.0", "-0.1", "50", "nan", "inf"])
def test_sparsity_out_of_range(place, sparsity):
    message = r"Sparsity must be a number in \[0, 1\), the fraction removed; got .*\. Use 0\.5 for half"
    refused(place, *MAGNITUDE, f"--sparsity={sparsity}", match=message)
    refused(place, "plan", "table.json", f"--sparsity={sparsity}", match=message)


@pytest.mark.parametrize("sparsity", ["half", "50%", "0,5"])
def test_sparsity_that_is_no_number(place, sparsity):
    refused(place, *MAGNITUDE, f"--sparsity={sparsity}", match=r"--sparsity.*number.*See: billhook prune --help")


def test_no_sparsity(place):
    refused(place, *MAGNITUDE, match=r"--sparsity 0\.5 removes half")


# Patterns and targets


@pytest.mark.parametrize("pattern", ["4:2", "2-4", "2:4:8", "structured", "0:4", ""])
def test_what_is_no_pattern(place, pattern):
    refused(place, *MAGNITUDE, f"--pattern={pattern}", match="neither 'unstructured' nor N:M")


def test_a_pattern_impossible_for_a_layer(place):
    message = rf"Pattern 2:5 is impossible for {Q}: its 32 columns do not divide by 5\. Leave it out with --ignore"
    refused(place, *MAGNITUDE, "--pattern", "2:5", match=message)


def test_a_pattern_that_contradicts_the_sparsity(place):
    refused(
        place,
        *MAGNITUDE,
        "--pattern",
        "2:4",
        "--sparsity",
        "0.6",
        match=r"keeps 2 of every 4: its sparsity is 0\.5, not 0\.6",
    )


@pytest.mark.parametrize(
    "arguments, match",
    [
        (
            ("--targets", "q_porj"),
            r"--targets q_porj matches no prunable layer\..*List them with billhook prune MODEL --dry-run",
        ),
        (("--targets", "Linaer"), r"Did you mean 'Linear'\?"),
        (("--ignore", "re:.*lm_head"), r"--ignore re:\.\*lm_head matches no prunable layer"),
        (("--ignore", "re:(["), r"--ignore re:\(\[: not a regular expression"),
        (("--ignore", "Linear"), "leave no layer to prune"),
    ],
    ids=str,
)
def test_patterns_that_match_nothing(place, arguments, match):
    refused(place, *MAGNITUDE, "--sparsity", "0.5", *arguments, match=match)


# Plans and tables


def planned(**sparsity: object) -> tuple[str, ...]:
    """Change layers of plan.json (None takes one out) and prune with it."""
    layers = json.loads(Path("plan.json").read_text())["weights"]
    edit("plan.json", weights={name: s for name, s in (layers | sparsity).items() if s is not None})
    return (*MAGNITUDE, "--plan", "plan.json")


def test_a_plan_for_another_model(place):
    tiny.save(place / "deeper", tiny.llama(num_hidden_layers=3))
    message = r"not for this model: 7 of its layers are not in the plan and 0 .*first: model\.layers\.2"
    refused(place, "prune", "deeper", *MAGNITUDE[2:], "--plan", "plan.json", match=message)


def test_a_plan_with_a_missing_layer(place):
    refused(place, *planned(**{UP: None}), match=rf"1 of its layers are not in the plan .*first: {UP}")


def test_a_plan_with_an_extra_layer(place):
    refused(
        place,
        *planned(**{f"{UP}x": 0.5}),
        match=rf"1 of the plan's are not in the model \(first: {UP}x\)\. Did you mean '{UP}'\?",
    )


@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), 1.5, -0.5, "0.5", None, True, 10**400], ids=lambda value: repr(value)[:8]
)
def test_a_plan_with_impossible_entries(place, bad):
    layers = json.loads(Path("plan.json").read_text())["weights"]
    edit("plan.json", weights=layers | {UP: bad})
    refused(
        place,
        *MAGNITUDE,
        "--plan",
        "plan.json",
        match=rf"plan\.json: {UP}: (A sparsity must be a number in \[0, 1\], got |Unknown storage type '0\.5')",
    )


def test_a_plan_whose_groups_do_not_fit(place):
    refused(place, *planned(**{UP: "2:5"}), match=rf"2:5 is impossible for {UP}: its 32 columns do not divide by 5")


def test_a_plan_that_pruning_cannot_apply(place):
    refused(
        place, *planned(**{UP: "q4_0"}), match=r"This plan stores layers as q4_0: billhook prune applies sparsities"
    )


def test_files_that_are_no_plan(place):
    refused(place, *MAGNITUDE, "--plan", "nowhere.json", match=r"There is no plan at nowhere\.json")
    refused(place, *MAGNITUDE, "--plan", "text.txt", match=r"text\.txt is not a plan: it is not valid json")
    refused(place, *MAGNITUDE, "--plan", "table.json", match=r"table\.json: 'sparsity' must be an object")


def test_a_plan_and_what_it_already_says(place):
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


def test_a_table_of_another_model(place):
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


def test_a_table_without_the_column(place):
    command = ("--sparsity", "0.5", "--table", "table.json", "--allocator", "owl")
    message = r"no column 'outlier_ratio:5'.* Make it with: billhook measure MODEL --metrics outlier_ratio:5"
    refused(place, *MAGNITUDE, *command, match=message)
    refused(place, "plan", "table.json", *command[:2], *command[4:], match=message)


# Text


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
def test_texts_that_cannot_be_used(place, name, content, match):
    Path(name).write_text(content)
    refused(place, *PRUNE[:6], "--calibration", name, *TEXT[2:], match=match)


def test_texts_that_are_not_there(place):
    refused(place, *PRUNE[:6], "--calibration", "texts.txt", match=r"There is no file texts\.txt")
    refused(place, *PRUNE[:6], "--calibration", "stdlib:all", match="use stdlib:train or stdlib:heldout")
    refused(place, "eval", "model", "--data", "texts.txt", match=r"There is no file texts\.txt")


def test_documents_shorter_than_a_window(place):
    Path("short.jsonl").write_text('{"text": "short"}\n' * 50)
    message = r"No document of short\.jsonl is longer than 32 tokens"
    refused(place, *PRUNE[:6], "--calibration", "short.jsonl", *TEXT[2:], "--published", match=message)


def test_windows_longer_than_the_context(place):
    refused(
        place,
        *PRUNE,
        "--length",
        "500",
        match=r"Windows of 500 tokens exceed the model's context of 128: use --length 128",
    )


@pytest.mark.parametrize("bad", [-1, 258, 10**9])
def test_token_ids_outside_the_vocabulary(place, bad):
    tokens = torch.zeros(4, 32, dtype=torch.int64)
    tokens[2, 7] = bad
    save_file({"tokens": tokens}, "tokens.safetensors")
    message = rf"tokens\.safetensors: token id {bad} at row 2, position 7 is outside the vocabulary"
    refused(place, *PRUNE[:6], "--calibration", "tokens.safetensors", match=message)
    refused(place, "eval", "model", "--data", "tokens.safetensors", match=message)


def test_no_tokenizer(place):
    for file in Path("model").glob("tokenizer*"):
        file.unlink()
    refused(place, *PRUNE, match=r"The model has no tokenizer to read text\.txt with: give a \.safetensors file")
