"""Commands and a server with packed models."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import billhook as command
from command import done
from paths import ROOT

import billhook
from billhook import pack


def test_eval_and_verify_accept_a_packed_model(place: Path, tmp_path: Path) -> None:
    text = tiny.text_file(tmp_path / "text.txt", 40)
    printed = [
        done("eval", place / name, "--data", text, "--length", 64, "--dtype", "float32", "--json").json
        for name in ("dense", "packed")
    ]
    assert printed[1]["token_ppl"] == pytest.approx(printed[0]["token_ppl"], rel=1e-4)
    seen = done("verify", place / "packed", "--json").json
    assert seen["ok"]
    assert seen["layers"] == 21


def test_verify_counts_what_billhook_json_says(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model", tiny.mixtral())
    billhook.prune(source, sparsity=0.5, pattern="2:4", criterion="magnitude", output=tmp_path / "pruned")
    dense = billhook.verify(tmp_path / "pruned")
    for values in ("stored", "int8"):
        pack(tmp_path / "pruned", tmp_path / values, values=values)  # type: ignore[arg-type]
        packed = billhook.verify(tmp_path / values)
        assert packed.ok, packed.problems
        assert (packed.layers, packed.zeros, packed.weights) == (dense.layers, dense.zeros, dense.weights)
    record = json.loads((tmp_path / "pruned" / "billhook.json").read_text())
    name = next(iter(record["layers"]))
    record["layers"][name]["zeros"] += 1
    (tmp_path / "pruned" / "billhook.json").write_text(json.dumps(record))
    pack(tmp_path / "pruned", tmp_path / "wrong")
    found = billhook.verify(tmp_path / "wrong")
    assert [problem for problem in found.problems if problem.startswith(f"{name}: ")]


@pytest.mark.parametrize("stream", [False, True])
def test_generate_prints_what_the_model_says(place: Path, stream: bool) -> None:
    options = ("--max-new-tokens", 9, "--dtype", "float32", *(["--stream"] if stream else []))
    packed, dense = (done("generate", place / name, "The quick", *options) for name in ("packed", "dense"))
    assert packed.out == dense.out
    assert "9 tokens: the first after" in packed.err
    assert "tokens/s" in packed.err
    printed = done("generate", place / "packed", "The quick", *options, "--json").json
    assert printed["text"].strip() == packed.out.strip()
    assert (printed["prompt_tokens"], printed["new_tokens"]) == (10, 9)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("generate", "packed", "x" * 200), "do not fit the model's context of 128"),
        (("generate", "nothing", "x"), "There is no model directory"),
        (("bench", "packed", "--against", "packed"), "given twice"),
        (("bench", "packed", "nothing"), "There is no model directory at nothing"),
        (("bench", "packed", "--batch", "one"), "--batch one: write numbers separated by commas"),
        (("bench", "packed", "--prompt", "0"), "must be at least 1"),
        (("bench", "packed", "--picture", "x.svg"), "needs --against"),
        (("bench", "packed", "--prompt", "500"), "packed reads at most 128 tokens, and a prompt of 500 with 64 new"),
        (("bench", "packed", "--new", "120"), "give smaller --prompt or --new"),
        (("bench", "packed", "dense", "--against", "packed", "--picture", "x.svg"), "at least two packed models"),
        (("unpack", "dense", "-o", "out"), "dense is not a packed model"),
        (("pack", "dense", "-o", "packed"), "exists and is not empty"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_unusable_options_with_packed_models_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], match: str
) -> None:
    monkeypatch.chdir(place)
    ran = command(*arguments)
    assert ran.code == 2
    assert match in ran.err
    assert len(ran.err.splitlines()) <= 2


@pytest.mark.nightly
def test_the_server_of_the_examples_answers(place: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "server" / "app.py", place / "packed", "--port", str(port)]
    )
    try:
        assert asked(port, "GET", "/health", None, lambda: server.poll() is None) == (
            200,
            {"model": "packed", "status": "ready"},
        )
        status, answer = asked(port, "POST", "/generate", {"prompt": "The quick", "max_new_tokens": 5})
        expected = done("generate", place / "packed", "The quick", "--max-new-tokens", 5, "--json").json
        assert (status, answer) == (200, {"text": expected["text"], "tokens": 5})
        assert asked(port, "POST", "/generate", {"prompt": ""})[0] == 422
    finally:
        server.terminate()
        server.wait(240)


def asked(port: int, method: str, path: str, body: Any, waiting: Callable[[], bool] | None = None) -> tuple[int, Any]:
    """Ask the server on this machine; `waiting` tells whether it may still come up."""
    end = time.monotonic() + 240
    while True:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
        try:
            line.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
            answer = line.getresponse()
            return answer.status, json.loads(answer.read())
        except ConnectionRefusedError:
            if waiting is None or not waiting() or time.monotonic() > end:
                raise
            time.sleep(0.3)
        finally:
            line.close()
