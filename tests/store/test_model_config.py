"""Entries of config.json that no command can use are refused by name before any work."""

import json
from pathlib import Path

import pytest
import tiny
from command import billhook

from billhook.errors import BillhookError
from billhook.store.model_config import model_config

NAN, INFINITE = float("nan"), float("inf")


def written(folder: Path, **entries) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **entries}))
    return folder


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"rms_norm_eps": NAN}, r"config\.json, rms_norm_eps is NaN: write the number"),
        ({"text_config": {"limits": [0.0, NAN]}}, r"config\.json, text_config, limits, 1 is NaN"),
        ({"dtype": 16}, r"config\.json, dtype: 16 is not the name of a dtype, such as bfloat16"),
        ({"torch_dtype": "Tensor"}, "torch_dtype: 'Tensor' is not the name of a dtype"),
        ({"vision_config": {"dtype": "half16"}}, "vision_config, dtype: 'half16' is not"),
    ],
)
def test_what_is_no_number_or_no_dtype_is_refused_by_name(tmp_path, entries, match):
    with pytest.raises(BillhookError, match=match):
        model_config(written(tmp_path, **entries))


def test_infinity_names_of_dtypes_and_words_of_a_vocabulary_are_accepted(tmp_path):
    entries = {"time_step_limit": [0.0, INFINITE], "dtype": "bfloat16", "vocabulary_map": {"dtype": 16}}
    entries["text_config"] = {"dtype": None, "torch_dtype": {"": "float32"}}
    assert model_config(written(tmp_path, **entries)) == {"model_type": "llama", **entries}


def test_every_command_refuses_it_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tiny.save(Path("model"), tiny.llama(num_hidden_layers=1), words=False)
    config = json.loads((source / "config.json").read_text())
    written(source, **config | {"rms_norm_eps": NAN})
    text = "--calibration", "stdlib:train"
    ours = "--criterion", "magnitude", "-o", "out"
    commands = [("prune", "model", "--sparsity", "0.5", *ours), ("pack", "model", "-o", "out")]
    commands += [
        ("generate", "model", "a"),
        ("quantize", "model", "--type", "int4", "--quantizer", "round", "-o", "out"),
    ]
    commands += [("slim", "model", "--remove", "0.5", "--units", "channels", "--method", "magnitude", "-o", "out")]
    commands += [("eval", "model", "--data", "stdlib:heldout"), ("measure", "model", "-o", "table.json")]
    commands += [("export", "model", "--to", "gguf", "-o", "out.gguf"), ("recover", "model", *text, "-o", "out")]
    for command in commands:
        ran = billhook(*command)
        assert ran.code == 2, command
        assert "rms_norm_eps is NaN" in ran.err, (command, ran.err)
