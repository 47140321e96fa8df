"""Outputs that cannot be written, full disks, no memory, Ctrl-C: one line on stderr, the right exit code, and nothing
left behind."""

import errno
import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import PRUNE, billhook, done, listing, refused
from paths import TESTS

import billhook.store.sinks as sinks
from billhook.cli.common import Failure, handle_errors
from billhook.engine.loop import _Applying
from billhook.errors import out_of_memory

# Output


def test_an_output_that_is_not_empty_is_refused(place):
    (place / "pruned").mkdir()
    (place / "pruned" / "notes.txt").write_text("mine")
    refused(
        place, *PRUNE, match=r"pruned exists and is not empty: choose another, or allow replacing it \(--overwrite\)"
    )
    refused(place, *PRUNE, "--overwrite", match="not a model directory, so it is not replaced")


def test_unusable_outputs_are_refused(place):
    refused(place, *PRUNE, "--output", "text.txt", match=r"text\.txt is a file: choose a directory")
    refused(place, *PRUNE, "--output", "no/folder", match=r"the folder .*no does not exist\. Create it first")
    refused(place, *PRUNE, "--output", "model", "--overwrite", match="or is inside it")
    refused(place, "measure", "model", "-o", "no/table.json", match="the folder no does not exist")
    refused(place, "measure", "model", "-o", "model", match="it is a directory")
    refused(
        place,
        "plan",
        "table.json",
        "--allocator",
        "atp",
        "--sparsity",
        "0.5",
        "-o",
        "no/plan.json",
        match="the folder no does not exist",
    )
    refused(place, "prune", "model" * 100, *PRUNE[2:], match="File name too long", code=1)


# Failures of the machine


def test_a_disk_that_fills_up_at_the_start_is_one_message(place, monkeypatch):
    monkeypatch.setattr(sinks, "lay_out", full)
    size = sum(path.stat().st_size for path in (place / "model").glob("*.safetensors")) / 2**20
    needs = re.escape(f"pruned needs {size:.1f} MiB, ")
    refused(
        place,
        *PRUNE,
        match=rf"The disk is full: writing .*{needs}.* are free\. Make room\. Nothing was left behind",
        code=1,
    )
    assert size > 0.1


@pytest.mark.parametrize(
    "where",
    [
        "store.directory.copy_files",
        "steps.partial_output.flush",
        "steps.partial_output.put_in_place",
        "store.directory.write_json",
    ],
)
def test_a_disk_that_fills_up_after_the_last_block_costs_no_finished_block(place, monkeypatch, where):
    with monkeypatch.context() as now:
        now.setattr(f"billhook.{where}", full)
        ran = billhook(*PRUNE)
    assert ran.code == 1
    match = (
        r"Computing on .*\nAbout .*\nbillhook: The disk is full: .*Make room\. "
        r"2 of 2 blocks are finished and kept in .*pruned\.partial: continue with "
    )
    assert re.fullmatch(match + r"the same command and --resume\.\n", ran.err)
    done(*PRUNE, "--resume")
    done("verify", "pruned")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_noticed_before_anything_is_written(place, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        refused(
            place,
            *PRUNE,
            "--output",
            str(disk / "pruned"),
            match=r"The disk of .*disk is too full: .* needed, .* free",
            code=1,
        )
        (disk / "filler").write_bytes(bytes(64 * 1024))
        refused(place, "measure", "model", "-o", str(disk / "table.json"), match="No space left on device", code=1)
        assert os.listdir(disk) == ["filler"]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_out_of_memory_is_one_message_with_advice(place, monkeypatch):
    def hungry(*_: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 9 bytes"
        )

    monkeypatch.setattr(_Applying, "layer", hungry)
    refused(place, *PRUNE, match="Out of memory. Use fewer --samples", code=1)


def test_only_errors_of_memory_are_reported_as_such():
    with pytest.raises((RuntimeError, MemoryError)) as real:
        torch.empty(1 << 60)
    assert out_of_memory(real.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("anything"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    for text in (
        "expected a contiguous memory format",
        "memory_format is not supported",
        "pin_memory: no accelerator",
        "shared memory",
    ):
        assert not out_of_memory(RuntimeError(text))


def test_a_file_in_the_place_of_the_output_is_refused(place):
    (place / "pruned.partial").write_text("mine")
    refused(place, *PRUNE, match=r"pruned\.partial, where the output would be written, is a file: move it away")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_one_message(place):
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "billhook", "plan", "table.json", "--allocator=atp", "--sparsity=0.5", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "billhook: Cannot read or write standard output: No space left on device."
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("debug", [False, True])
def test_a_mistake_of_our_own_is_one_line_and_its_traceback_is_there_on_request(monkeypatch, capsys, debug):
    @handle_errors
    def broken(as_json: bool) -> None:
        raise KeyError("weights")

    monkeypatch.setenv("BILLHOOK_DEBUG", "1" if debug else "")
    with pytest.raises(Failure) as failure:
        broken(as_json=True)
    said, last = (
        capsys.readouterr(),
        r"billhook: Internal error at test_failures\.py:\d+, KeyError: 'weights'\. Please .*\n",
    )
    assert failure.value.exit_code == 1
    assert json.loads(said.out)["exit_code"] == 1
    assert re.fullmatch((r"Traceback[\s\S]*KeyError: 'weights'\n" if debug else "") + last, said.err)


def test_the_reason_behind_a_refused_file_is_there_on_request(place, monkeypatch):
    config = place / "model" / "config.json"
    config.write_text(config.read_text().replace('"silu"', "3"))
    for debug in (False, True):
        monkeypatch.setenv("BILLHOOK_DEBUG", "1" if debug else "")
        ran = billhook(*PRUNE)
        assert ran.code == 2
        assert ("Traceback" in ran.err) == debug
        assert "transformers cannot load model" in ran.err.splitlines()[-1]


# Interruptions

MOMENTS = {"loading": "billhook.steps.request.open_streamed", "pruning": "billhook.methods.sparse.wanda.wanda"}
_STOPPED = "billhook: Stopped. Nothing was written.\n"
_STOPPING = "Stopping after this block. Press Ctrl-C again to stop at once; finished blocks are kept either way.\n"


def stop_after(moment: str) -> None:
    """Let the function of that moment leave a sign when it is done, wait there, and leave another at Ctrl-C."""
    module, _, name = MOMENTS[moment].rpartition(".")
    original = getattr(importlib.import_module(module), name)

    @functools.wraps(original)
    def stop(*arguments, **options):
        result = original(*arguments, **options)
        interrupted = signal.getsignal(signal.SIGINT)

        def noted(*about):
            interrupted(*about)
            Path("../noted").touch()

        signal.signal(signal.SIGINT, noted)
        Path("../here").touch()
        time.sleep(240)  # ends a test that would wait forever
        return result

    setattr(importlib.import_module(module), name, stop)


def forked(moment: str) -> int:
    """Start PRUNE in a copy of this process, which spares it the imports; what it leaves behind goes to ../ran. Returns
    its number."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_after(moment)
        ran = billhook(*PRUNE, "--json")
        Path("../ran").write_text(json.dumps([ran.code, ran.out, ran.err]))
    finally:
        os._exit(0)


def wait_for(sign: str) -> None:
    deadline = time.monotonic() + 240
    while not os.path.exists(sign):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_is_one_message_and_leaves_nothing(place, moment, number):
    before = listing(place)
    child = forked(moment)
    wait_for("../here")
    os.kill(child, number)
    graceful = moment == "pruning" and number == signal.SIGINT
    if graceful:
        wait_for("../noted")
        os.kill(child, number)
    os.waitpid(child, 0)
    code, out, err = json.loads(Path("../ran").read_text())
    said = re.sub(r"^(Computing on|About) .*\n", "", err, flags=re.MULTILINE)
    assert (code, said) == (1, _STOPPING * graceful + _STOPPED)
    assert json.loads(out) == {"error": _STOPPED[10:-1], "exit_code": 1}
    assert listing(place) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_ctrl_c_finishes_the_block_and_says_how_to_resume(place):
    """The block in work when it comes is finished and kept; the run goes on from there to what an uninterrupted one
    writes."""
    done(*PRUNE)
    whole = {name: data for name, data in listing(place / "pruned").items() if name.endswith(".safetensors")}
    shutil.rmtree(place / "pruned")
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            real = _Applying.layer

            def slow(*args: object) -> object:
                Path("../here").touch()
                while not Path("../go").exists():
                    time.sleep(0.01)
                return real(*args)

            _Applying.layer = slow
            ran = billhook(*PRUNE)
            Path("../ran").write_text(json.dumps([ran.code, ran.out, ran.err]))
        finally:
            os._exit(0)
    wait_for("../here")
    os.kill(child, signal.SIGINT)
    Path("../go").touch()
    os.waitpid(child, 0)
    code, _, err = json.loads(Path("../ran").read_text())
    kept = r"1 of 2 blocks are finished and kept in .*pruned\.partial: continue with the same command and --resume\.\n"
    assert code == 1
    assert re.fullmatch(rf"Computing on .*\nAbout .*\n{re.escape(_STOPPING)}billhook: Stopped\. {kept}", err), err
    assert not (place / "pruned").exists()
    done(*PRUNE, "--resume")
    assert {name: data for name, data in listing(place / "pruned").items() if name in whole} == whole


@pytest.mark.nightly
def test_ctrl_c_in_a_shell_stops_without_a_traceback(place):
    before = listing(place)
    paths = [str(TESTS), str(TESTS / "cli")]
    code = f"import sys; sys.path[:0] = {paths}\nimport test_failures\nfrom billhook.cli import main\n"
    code += "test_failures.stop_after('pruning')\nmain()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *PRUNE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for("../here")
    process.send_signal(signal.SIGINT)
    wait_for("../noted")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert (out, err.splitlines(keepends=True)[2:]) == ("", [_STOPPING, _STOPPED])
    assert process.returncode == 1
    assert listing(place) == before
