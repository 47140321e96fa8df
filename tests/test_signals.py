"""SIGTERM and Ctrl-C end a command with its documented line and code, whenever they come."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from billhook import signals

STOPPED = "billhook: Stopped. Nothing was written.\n"
WHEN = """
import builtins, os, runpy, signal, sys
moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
original = builtins.__import__

def watched(name, *rest, **more):
    if name == moment:
        builtins.__import__ = original
        os.kill(os.getpid(), number)
    return original(name, *rest, **more)

builtins.__import__ = watched
runpy.run_module("billhook", run_name="__main__")
"""


@pytest.mark.gate
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["typer", "billhook.cli.common", "billhook.steps.request", "torch"])
def test_a_signal_while_the_command_is_starting_is_one_line_and_code_1(moment, number, tmp_path):
    command = ["prune", "model", "-o", "out", "--sparsity", "0.5", "--json"]
    ran = subprocess.run(
        [sys.executable, "-c", WHEN, moment, str(int(number)), *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert (ran.returncode, ran.stderr) == (1, STOPPED)
    assert json.loads(ran.stdout) == {"error": STOPPED[10:-1], "exit_code": 1}
    assert not list(tmp_path.iterdir())


class Ending:
    """Sends SIGTERM while it is deleted, where Python drops exceptions."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def end_and_wait(ended: list[bool]) -> None:
    Ending()
    time.sleep(240)  # ends a test that would wait forever
    ended.append(True)


def test_a_signal_in_a_destructor_is_not_lost(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # restores it
    ended: list[bool] = []
    try:
        signals.install()
        with pytest.raises(KeyboardInterrupt):
            end_and_wait(ended)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended
