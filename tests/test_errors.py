"""Errors speak the language of the caller: options on the command line, keywords in Python."""

import ast
import re
import shlex
import signal
from types import SimpleNamespace

import pytest
from command import billhook
from paths import ROOT

import billhook as api
from billhook.distributed.collectives import _end
from billhook.errors import BillhookError, Interrupted, JobError, ignoring, in_python, on_command_line


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("use --dtype float32.", 'use dtype="float32".'),
        ("Continue it with --resume, or --overwrite.", "Continue it with resume=True, or overwrite=True."),
        ("smaller --samples or --length.", "smaller samples or length."),
        ("--sparsity 0.5 removes half", "sparsity=0.5 removes half"),
        ("--calibration FILE.txt or --calibration self: now", 'calibration="FILE.txt" or calibration="self:" now'),
        ("leave out --set beta", "leave out beta"),
        ("--set epsilon=0.3 is less", "epsilon=0.3 is less"),
        ("use --recipe wanda, or --allocator owl", 'use recipe="wanda", or allocator="owl"'),
        ("Leave it out with --ignore model.layers.0.q", 'Leave it out with ignore="model.layers.0.q"'),
        (r"Leave out --ignore 're:a\.\d+$'.", r"Leave out ignore=r're:a\.\d+$'."),
        ("Or a smaller --batch-size", "Or a smaller batch_size"),
        ("Make it: billhook measure MODEL --metrics y -o T", "Make it: billhook measure MODEL --metrics y -o T"),
    ],
)
def test_options_are_shown_as_keywords_and_commands_stay(said: str, shown: str) -> None:
    assert in_python(said) == shown
    assert str(BillhookError(said)) == shown
    with on_command_line():
        assert str(BillhookError(said)) == said


def literals() -> list[str]:
    """Every text of the package that could be a message, with X where a value is put in."""
    found = []
    for path in sorted((ROOT / "billhook").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree) if "cli" not in path.parts and path.name != "errors.py" else ():
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                found.append(node.value)
    return found


def test_no_message_of_the_package_shows_an_option_to_python() -> None:
    options = re.compile(r"(?<![\w-])--[a-z]")
    shell = re.compile(r"(?:billhook [a-z]+|llama-[\w-]+) .*?(?=[.;:)](?:\s|$)|$)")
    messages = [text for text in literals() if options.search(text)]
    assert len(messages) > 50
    for text in messages:
        assert not options.search(shell.sub("", in_python(text))), text


def test_a_mistake_reads_as_the_caller_wrote_it(tmp_path) -> None:
    with pytest.raises(BillhookError, match=r'needs activations: give text with calibration="FILE\.txt"'):
        api.prune("billhook/demo_model", sparsity=0.5)
    ran = billhook("prune", "billhook/demo_model", "--sparsity", "0.5", "-o", tmp_path / "out")
    assert "give text with --calibration FILE.txt" in ran.err


@pytest.mark.parametrize("kind", [BillhookError, JobError])
@pytest.mark.parametrize("name", ["a\nb", "a\r\x1b[2Jb", "a\x00b", "a\u2028b", "a\x85b"])
def test_control_characters_in_a_name_are_shown_escaped(kind, name):
    text = str(kind(f"the layer {name} is missing."))
    assert text.isprintable()
    assert text == f"the layer {repr(name)[1:-1]} is missing."
    assert str(kind(f"{kind('the layer ' + name)} twice")) == f"the layer {repr(name)[1:-1]} twice"


def test_other_characters_stay():
    assert str(BillhookError("Größe, naïve 名前 \\n")) == "Größe, naïve 名前 \\n"


def test_layers_to_leave_out_are_named_as_each_caller_writes_them():
    names = [f"model.layers.{i}.mlp.up" for i in range(4)]
    assert ast.literal_eval(ignoring(names[:2]).removeprefix("ignore=")) == names[:2]
    (pattern,) = ast.literal_eval(ignoring(names).removeprefix("ignore="))
    assert all(re.fullmatch(pattern.removeprefix("re:"), name) for name in names)
    with on_command_line():
        assert shlex.split(ignoring(names)) == ["--ignore", pattern]
        assert ignoring(["a", "b"]) == "--ignore a --ignore b"


@pytest.mark.parametrize("advised", [True, False])
def test_how_a_run_that_lost_a_process_goes_on_is_said_once_also_in_python(advised, monkeypatch):
    """There the option in the message is a keyword."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    heart = SimpleNamespace(lost=lambda: "Process 1 was lost.", leave=lambda failure: None)
    what = "Block 1 is kept: continue with the same command and --resume." if advised else "The connection broke."
    error = Interrupted(what, advised=advised)
    with pytest.raises(Interrupted) as raised:
        _end(heart, error)
    assert str(raised.value).count("resume=True") == 1
