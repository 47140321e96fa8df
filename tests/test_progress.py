"""What is shown while a long job runs: a bar on a terminal, plain lines where a bar would break things."""

import os
import sys

import pytest

from billhook.cli import common


def shown(monkeypatch, term: str, every: float = common.EVERY) -> str:
    """What comes out of a terminal of kind `term` while three layers are done."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(common, "EVERY", every)
    with open(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with common.progress("pruning", total=3) as advance:
            for layer in range(3):
                advance(f"layer {layer}")
        print("end", file=terminal)
        terminal.flush()
        monkeypatch.undo()
        text = ""
        while not text.endswith("end\r\n"):
            text += os.read(master, 65536).decode()
    os.close(master)
    return text


def test_a_terminal_gets_a_bar_with_counts_and_the_layer(monkeypatch):
    text = shown(monkeypatch, "xterm")
    assert "\x1b[" in text
    assert "3/3" in text
    assert "layer 2" in text


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(monkeypatch, term):
    assert shown(monkeypatch, term) == "end\r\n"  # nothing in the first minute
    text = shown(monkeypatch, term, every=0.0)
    lines = "".join(f"pruning: {n} of 3, about 0 min left, layer {n - 1}\r\n" for n in (1, 2, 3))
    assert text == lines + "end\r\n"


def test_a_file_gets_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(common, "EVERY", 0.0)
    with common.progress("measuring") as advance:
        advance("model.layers.0.mlp.up_proj")
    assert capsys.readouterr().err == "measuring: 1, model.layers.0.mlp.up_proj\n"


def test_a_notebook_gets_plain_lines(monkeypatch, capsys):
    """Rich takes a notebook by the name of its shell, and would ask for widgets."""

    class ZMQInteractiveShell:
        pass

    from rich import console

    monkeypatch.setattr(console, "get_ipython", ZMQInteractiveShell, raising=False)
    assert console.Console().is_jupyter
    monkeypatch.setattr(common, "EVERY", 0.0)
    with common.progress("pruning", total=1) as advance:
        advance("layer 0")
    assert capsys.readouterr().err == "pruning: 1 of 1, about 0 min left, layer 0\n"
