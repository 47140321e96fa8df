"""Files from elsewhere, damaged in many ways and given to the real commands: each is read, or refused in a few words,
and no command ends in an internal error.
"""

import copy
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import billhook, done
from paths import DEMO

from billhook.cli import app
from billhook.errors import Interrupted
from billhook.steps.prune import prepare, run
from billhook.steps.prune_job import PruneRequest

TEXT = ("--calibration", "text.txt", "--samples", "4", "--length", "16")
SCORED = ("--data", "text.txt", "--length", "16", "--limit", "2")
PRUNE = ("--sparsity", "0.5", "--criterion", "magnitude", "--allocator", "uniform")
SEARCH = ("search", "model", *PRUNE[:4], "--allocator", "atp", "--budget", "1", *TEXT, "-o", "found", "--no-model")
GRID = ("compare", "model", "--sparsities", "0.4,0.5", "--criteria", "magnitude", "--seeds", "2", *SCORED, *TEXT[:4])
GRID = (*GRID, "-o", "grid")
EXPORT = ("export", "model", "-o", "out")
DECODE = ("export", "quantized", "--to", "dense", "-o", "out")
OUTLIERS = ("--metrics", "outlier_ratio:5", *TEXT, "-o", "out")
UNPACK = ("unpack", "packed", "-o", "out")
GBLM = ("--criterion", "gblm", "--gradients", "gradients.safetensors")
SPEAK = ("The quick", "--max-new-tokens", "3")
ROUND = ("quantize", "model", "--quantizer", "round")
RECOVER = ("recover", "pruned", *TEXT[:2], "--length", "16", "--tokens", "64", "--rate", "0.01", "-o", "out")
COMPRESS = ("compress", "model", "--size", "25400", "--types", "int8/16,int4/16", "--for", "transformers", *TEXT)
# file -> the commands that read it
READERS: dict[str, list[tuple[str, ...]]] = {
    "table.json": [
        ("plan", "table.json", "--sparsity", "0.5", "--allocator", "owl"),
        ("plot", "table.json", "-o", "pictures"),
        ("report", "pruned", "--table", "table.json"),
        ("prune", "model", *PRUNE[:4], "--allocator", "alphapruning", "--table", "table.json", "-o", "out"),
    ],
    "plan.json": [
        ("prune", "model", "--criterion", "magnitude", "--plan", "plan.json", "-o", "out"),
        ("plot", "table.json", "--plan", "plan.json", "-o", "pictures"),
        ("compare", "model", "--plans", "plan.json", "--criteria", "magnitude", *SCORED, "-o", "other"),
    ],
    "pruned/billhook.json": [
        ("verify", "pruned"),
        ("report", "pruned"),
        ("pack", "pruned", "-o", "out"),
        ("prune", "pruned", *PRUNE, "-o", "out"),
        ("eval", "pruned", *SCORED, "--report"),
        RECOVER,
    ],
    "pruned/report.json": [
        ("report", "pruned"),
        ("pack", "pruned", "-o", "out"),
        ("eval", "pruned", *SCORED, "--report"),
        ("compare", "--runs", "pruned", "pruned"),
    ],
    "quantized/billhook.json": [("verify", "quantized"), ("report", "quantized"), DECODE],
    "quantized/config.json": [("verify", "quantized"), DECODE, ("export", "quantized", "--to", "vllm", "-o", "out")],
    "types.json": [(*ROUND, "--plan", "types.json", "-o", "out")],
    "bench.json": [("report", "pruned", "--speed", "bench.json")],
    "grid/compare.json": [(*GRID, "--errors"), ("compare", "--runs", "grid", "grid")],
    "found/search.json": [SEARCH],
    "half.partial/billhook.unfinished.json": [
        ("prune", "model", *PRUNE, "-o", "half", "--resume"),
        ("verify", "half.partial"),
    ],
    "model/config.json": [
        ("prune", "model", *PRUNE, "-o", "out"),
        ("eval", "model", *SCORED),
        ("generate", "model", *SPEAK),
        (*ROUND, "--type", "int8", "-o", "out"),
        (*COMPRESS, "-o", "out"),
        ("imatrix", "model", *TEXT, "-o", "out"),
        ("slim", "model", "--remove", "0.25", *TEXT, "-o", "out"),
        EXPORT,
    ],
    "pruned/config.json": [("verify", "pruned"), ("pack", "pruned", "-o", "out")],
    "model/generation_config.json": [("prune", "model", *PRUNE, "-o", "out"), ("generate", "model", *SPEAK)],
    "model/tokenizer.json": [("measure", "model", *OUTLIERS), ("generate", "model", *SPEAK), EXPORT],
    "model/tokenizer_config.json": [("eval", "model", *SCORED), ("generate", "model", *SPEAK), EXPORT],
    "sharded/model.safetensors.index.json": [("prune", "sharded", *PRUNE, "-o", "out"), ("verify", "sharded")],
    "sharded/model-00001-of-00003.safetensors": [("prune", "sharded", *PRUNE, "-o", "out")],
    "packed/billhook_packed.json": [("verify", "packed"), UNPACK, ("generate", "packed", *SPEAK)],
    "packed/model.packed.safetensors": [UNPACK, ("generate", "packed", *SPEAK)],
    "packed/config.json": [("verify", "packed"), ("generate", "packed", *SPEAK)],
    "packed/report.json": [UNPACK],
    "gradients.safetensors": [("prune", "model", *PRUNE[:2], *GBLM, *TEXT, "-o", "out")],
    "tokens.safetensors": [("eval", "model", "--data", "tokens.safetensors")],
    "text.jsonl": [("eval", "model", "--data", "text.jsonl", *SCORED[2:])],
    "matrix.gguf": [(*ROUND, "--type", "int8", "--imatrix", "matrix.gguf", "-o", "out")],
    "template.gguf": [(*EXPORT, "--template", "template.gguf")],
    "items.jsonl": [("eval", "model", "--tasks", "items.jsonl", "--length", "16")],
    "sparsities.json": [
        ("plan", "table.json", "--sparsity", "0.5", "--allocator", "explicit", "--set", "file=sparsities.json")
    ],
}
# a rope of -1 gives NaN, and a state that counts zeros wrongly a directory that is not as recorded: jobs that fail
FAILING = ("model/config.json", "packed/config.json", "half.partial/billhook.unfinished.json")
GONE = object()
VALUES = (GONE, None, True, "x", "", -1, 0, 3, 0.5, -0.5, 1e308, 2**63, 10**400, float("nan"), float("inf"))
VALUES = (*VALUES, [], {}, [0], ["a", None], {"a": 1}, "../../etc/passwd", "\0")
TEXTS = (b"", b"{", b"[]", b"{}", b"null", b'"x"', b"NaN", b'{"version": 1}', b"\xff\xfe{}", b"\0" * 20)
TEXTS = (*TEXTS, b"[" * 50_000, b'{"a":' * 20_000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file in order."""
    place = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(place)
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    tiny.save(Path("model"), tiny.llama(**small))
    tiny.save(Path("sharded"), tiny.llama(**small), shard="12KB")
    assert len(list(Path("sharded").glob("*.safetensors"))) == 3
    tiny.text_file(Path("text.txt"), 30)
    Path("text.jsonl").write_text("".join(f'{{"text": "{n} {"word " * 9}"}}\n' for n in range(9)))
    Path("items.jsonl").write_text('{"requests": [["The sky is", " blue."], ["The sky is", " edible."]], "gold": 0}\n')
    Path("sparsities.json").write_text('{"blocks": [0.4, 0.6]}')
    metrics = "alpha_peak,spectrum_quantiles,outlier_ratio:5"
    done("measure", "model", "-o", "table.json", "--metrics", metrics, *TEXT)
    done("plan", "table.json", "--allocator", "alphapruning", "--sparsity", "0.5", "-o", "plan.json")
    done("prune", "model", "--criterion", "wanda", "--plan", "plan.json", *TEXT, "-o", "pruned")
    done("eval", "pruned", *SCORED, "--against", "model", "--report", "--protocol", "both")
    done("eval", "pruned", "--tasks", "items.jsonl", "--report")
    spread = {"median": 1.0, "low": 1.0, "high": 2.0}
    cell = {"batch": 1, "prompt": 4, "prefill": spread, "decode": spread, "prefill_speedup": spread}
    side = {"name": "packed", "file_bytes": 1, "memory_bytes": 1, "cells": [cell]}
    Path("bench.json").write_text(json.dumps({"models": [side]}))
    done("report", "pruned", "--table", "table.json", "--speed", "bench.json")
    done("pack", "pruned", "-o", "packed")
    done("export", "model", "-o", "template.gguf")
    done("imatrix", "model", *TEXT, "-o", "matrix.gguf")
    done(*ROUND, "--type", "int8", "-o", "quantized")
    plan = json.loads(Path("quantized/billhook.json").read_text())["steps"][-1]["plan"]
    Path("types.json").write_text(json.dumps(plan))
    done(*GRID)
    done(*SEARCH)
    done("gradients", "model", *TEXT, "-o", "gradients.safetensors")
    shutil.copyfile(tokens(place), "tokens.safetensors")
    with suppress(Interrupted):
        run(prepare(PruneRequest("model", output="half", sparsity=0.5, criterion="magnitude")), stopping=lambda: True)
    os.chdir(before)
    return place


def tokens(place: Path) -> Path:
    import torch
    from safetensors.torch import save_file

    save_file({"tokens": torch.arange(64).view(4, 16)}, place / "made.safetensors")
    return place / "made.safetensors"


def test_every_command_that_reads_a_file_is_tried() -> None:
    tried = {command[0] for commands in READERS.values() for command in commands}
    without = {"demo", "ls", "bench", "gradients"}  # they read models as the others do, or nothing
    assert tried == {command.name for command in app.registered_commands} - without


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside a json value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def changed(value: Any, way: tuple[Any, ...], new: object) -> Any:
    """A copy of a json value in which one value is gone or another."""
    inner = value = copy.deepcopy(value)
    for key in way[:-1]:
        inner = inner[key]
    if new is GONE:
        del inner[way[-1]]
    else:
        inner[way[-1]] = new
    return value


def damages(data: bytes, name: str, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Contents for a file: `count` with one value of its json replaced, those near the top more often, and some that
    are cut, flipped or another text."""
    chance = random.Random(f"{name} {seed}")
    texts = [(f"the text {text[:20]!r}", text) for text in TEXTS]
    cut = chance.randrange(len(data))
    texts += [(f"cut at {cut}", data[:cut]), ("with a byte order mark", b"\xef\xbb\xbf" + data)]
    yield from chance.sample(texts, min(len(texts), 2 + count // 3))
    for at in (int(len(data) ** chance.random()) - 1 for _ in range(count if name.endswith(".gguf") else 1)):
        yield f"flipped at {at}", data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if name.endswith(".gguf"):
        return
    start, lines = b"", data
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        start, lines = data[8 + length :], data[8 : 8 + length]
    value = json.loads(lines.splitlines()[0] if name.endswith(".jsonl") else lines)
    ways = sorted(places(value), key=lambda way: chance.random() * len(way))[:count]
    for way in ways:
        new = chance.choice(VALUES)
        text = json.dumps(changed(value, way, new)).encode()
        whole = len(text).to_bytes(8, "little") + text + start if name.endswith(".safetensors") else text
        yield f"{way} = {'gone' if new is GONE else repr(new)[:40]}", whole


def refused_or_read(whole: Path, folder: Path, name: str, content: bytes, command: tuple[str, ...], what: str) -> None:
    """Run a command on a copy of the folder in which one file has another content."""
    place = shutil.copytree(whole, folder / "place")
    os.chdir(place)
    Path(name).write_bytes(content)
    ran = billhook(*command)  # an exception or an internal error fails the test
    said = f"{name}: {what}\n{' '.join(command)}\n{ran.err}"
    assert "Traceback" not in ran.err, said
    assert ran.code in ((0, 1, 2) if command[0] == "verify" or name in FAILING else (0, 2)), said
    if ran.code == 2:
        assert len(ran.err) < 1500, said
        assert not Path("out").exists(), said
    os.chdir(folder)
    shutil.rmtree(place)


def try_all(whole: Path, folder: Path, name: str, count: int, seed: int) -> None:
    data, commands = (whole / name).read_bytes(), READERS[name]
    for number, (what, content) in enumerate(damages(data, name, count, seed)):
        for command in commands if count > 9 else [commands[number % len(commands)]]:
            refused_or_read(whole, folder, name, content, command, what)


@pytest.mark.gate
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_or_read(whole, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try_all(whole, tmp_path, name, 4, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("name", READERS)
def test_a_file_damaged_in_many_ways_is_refused_or_read(whole, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try_all(whole, tmp_path, name, 60, seed=1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_attention_heads": 3}, "transformers cannot load"),
        ({"hidden_act": 3}, "transformers cannot load .*hidden_act"),
        ({"architectures": [0]}, r"config\.json, architectures, number 0: must be a string, found 0"),
        ({"model_type": ["llama"]}, r"config\.json, model_type: must be a string, found \['llama'\]"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, and its files hold \d+ tensors"),
        ({"dtype": [0]}, r"config\.json, dtype: \[0\] is not the name of a dtype"),
    ],
)
def test_a_configuration_that_no_model_has_is_named(tmp_path, monkeypatch, changes, match):
    shutil.copytree(DEMO, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | changes))
    for command in (("prune", "model", *PRUNE, "-o", "out"), ("eval", "model", "--data", "stdlib:heldout")):
        ran = billhook(*command)
        assert ran.code == 2, ran.err
        assert re.search(match, ran.err), ran.err
