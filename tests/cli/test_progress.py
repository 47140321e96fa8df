"""What is shown while a long job runs: a bar on a terminal, plain lines where a bar would break things; the time
left."""

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


def test_a_terminal_gets_a_bar_with_counts_the_time_left_and_the_layer(monkeypatch):
    text = shown(monkeypatch, "xterm")
    assert "\x1b[" in text
    assert "3/3" in text
    assert "about 0.0 s left layer 2" in text


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_plain_lines(monkeypatch, term):
    assert shown(monkeypatch, term) == "end\r\n"  # nothing in the first minute
    text = shown(monkeypatch, term, every=0.0)
    lines = "".join(f"pruning: {n} of 3, about 0.0 s left, layer {n - 1}\r\n" for n in (1, 2, 3))
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
    assert capsys.readouterr().err == "pruning: 1 of 1, about 0.0 s left, layer 0\n"


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(common.time, "monotonic", lambda: self.now)


def test_the_time_left_is_that_of_the_blocks_left_and_runs_down(monkeypatch):
    """Four blocks of two layers, of which most of the time passes before the first layer."""
    clock = Clock(monkeypatch)
    left = common.TimeLeft(8, unit=2)
    assert left.seconds is None
    clock.now += 9
    left.advance()
    assert left.seconds is None
    clock.now += 1
    left.advance()
    assert left.seconds == pytest.approx(30)
    clock.now += 9
    left.advance()
    assert left.seconds == pytest.approx(21)
    clock.now += 11  # this block takes twice as long
    left.advance()
    assert left.seconds == pytest.approx(30)
    assert str(left) == "about 30 s left"
    clock.now += 1000
    assert left.seconds == 0
    for _ in range(4):
        left.advance()
    assert left.seconds == 0


def test_blocks_of_an_earlier_run_do_not_count_for_the_time_left(monkeypatch):
    clock = Clock(monkeypatch)
    left = common.TimeLeft(8, unit=2, skipped=4)
    for _ in range(4):
        clock.now += 0.01
        left.advance()
    assert left.seconds is None
    for _ in range(2):
        clock.now += 5
        left.advance()
    assert left.seconds == pytest.approx(10)


def test_without_a_total_no_time_left_is_shown(monkeypatch):
    left = common.TimeLeft(None)
    left.advance()
    assert left.seconds is None
    assert str(left) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (90, "90 s"), (150, "2.5 min"), (5400, "90 min"), (1e5, "28 h")],
)
def test_durations_have_two_or_three_digits(seconds, text):
    assert common.duration(seconds) == text
