"""Files from strangers: whatever is in them, a reader answers or refuses in a sentence, and touches nothing outside its
place."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import TESTS

from billhook import Plan, Table, prune
from billhook.engine.gradient_file import open_gradients
from billhook.errors import BillhookError
from billhook.plan.plan import load_plan
from billhook.steps.state import STATE, read_state
from billhook.steps.verify import verify
from billhook.store.checkpoint import check_directory, load_tokenizer
from billhook.store.layout import RECORD
from billhook.store.shards import INDEX, read_shard, weight_files
from billhook.text.windows import load_calibration

pytestmark = pytest.mark.gate

QUICK = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../../etc/passwd", "/etc/passwd", "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    model = tiny.save(folder / "model", tiny.llama(num_hidden_layers=2), shard="60KB")
    return prune(model, sparsity=0.5, criterion="magnitude", output=folder / "out").output


def tokens(path: Path) -> Any:
    return load_calibration(str(path), None, samples=1, length=2, seed=0, sampling="packed", vocab_size=258)


READERS: dict[str, Callable[[Path], Any]] = {
    "plan.json": load_plan,
    "table.json": Table.load,
    RECORD: lambda path: verify(path.parent),
    INDEX: lambda path: weight_files(path.parent),
    STATE: lambda path: read_state(path.parent),
    "config.json": lambda path: check_directory(path.parent),
    "text.jsonl": tokens,
    "tokens.safetensors": tokens,
    "gradients.safetensors": open_gradients,
    "model.safetensors": read_shard,
}


def refused_or_read(name: str, folder: Path, data: bytes) -> None:
    """Read a file of these bytes: an answer, or a refusal of one or two lines."""
    path = folder / name
    path.write_bytes(data)
    before = sorted(os.listdir(folder))
    said = "read"
    try:
        READERS[name](path)
    except BillhookError as error:
        said = str(error)
    assert 0 < len(said) < 2000
    assert said.count("\n") <= 1
    assert sorted(os.listdir(folder)) == before
    path.unlink()


@pytest.mark.parametrize("name", READERS)
@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(name, data, tmp_path):
    refused_or_read(name, tmp_path, data)


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith("json")])
@QUICK
@given(value=VALUES)
def test_any_json_is_read_or_refused(name, value, tmp_path):
    refused_or_read(name, tmp_path, json.dumps(value).encode())


SEEDS = {
    "plan.json": lambda out: Plan.from_json(json.loads((out / RECORD).read_text())["steps"][0]["plan"], "x").to_json(),
    RECORD: lambda out: json.loads((out / RECORD).read_text()),
    INDEX: lambda out: json.loads((out / INDEX).read_text()),
    "config.json": lambda out: json.loads((out / "config.json").read_text()),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a json value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in inner for deeper in places(item, (*path, key)))]


@pytest.mark.parametrize("name", SEEDS)
@settings(QUICK, max_examples=120)
@given(data=st.data())
def test_real_files_with_one_value_replaced_are_read_or_refused(name, pruned, data, tmp_path_factory):
    value = SEEDS[name](pruned)
    *way, last = data.draw(st.sampled_from(places(value)[1:]))
    inner = value
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(VALUES)
    folder = tmp_path_factory.mktemp("one")
    refused_or_read(name, folder, json.dumps(value).encode())


@settings(QUICK, max_examples=120)
@given(data=st.data())
def test_headers_with_one_value_replaced_are_read_or_refused(pruned, data, tmp_path_factory):
    file = sorted(pruned.glob("*.safetensors"))[0].read_bytes()
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    *way, last = data.draw(st.sampled_from(places(header)[1:]))
    inner = header
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(VALUES | st.sampled_from([-1, 2**63, 2**200, [2**62, 2**62], [0, 2**63], [-8, 8]]))
    text = json.dumps(header).encode()
    folder = tmp_path_factory.mktemp("header")
    refused_or_read("model.safetensors", folder, len(text).to_bytes(8, "little") + text + file[8 + length :])


@pytest.mark.parametrize("name", [name for name in READERS if name.endswith("json")])
@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 100_000,
        b'{"version": 1' + b"0" * 5000 + b"}",
        b'"' + b"a" * 1_000_000 + b'"',
    ],
)
def test_deeply_nested_json_is_refused(name, bomb, tmp_path):
    refused_or_read(name, tmp_path, bomb)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 101_000_000, 0, 7])
def test_absurd_header_lengths_are_refused_at_once(length, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(BillhookError, match="safetensors"):
        read_shard(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", "model\0.safetensors"]
)
def test_an_index_that_contradicts_the_shards_is_refused(name, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(BillhookError, match="names"):
        weight_files(tmp_path)


def test_an_index_of_missing_tensors_is_refused(pruned, tmp_path):
    model = shutil.copytree(pruned, tmp_path / "model")
    index = json.loads((model / INDEX).read_text())
    for file in set(index["weight_map"].values()):
        kept = read_shard(model / file)
        if "model.layers.1.mlp.up_proj.weight" in kept.entries:
            data = (model / file).read_bytes()
            (model / file).write_bytes(
                data.replace(b"model.layers.1.mlp.up_proj.weight", b"model.layers.1.mlp.up_projX.weigh")
            )
    with pytest.raises(
        BillhookError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing|has no place in the model"
    ):
        prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
    assert os.listdir(tmp_path) == ["model"]


def test_names_in_a_plan_are_not_used_as_paths(pruned, tmp_path):
    plan = Plan.from_json(json.loads((pruned / RECORD).read_text())["steps"][0]["plan"], "x").to_json()
    key = next(key for key, value in plan.items() if isinstance(value, dict) and "model.layers.0.mlp.up_proj" in value)
    plan[key] = {f"../../{name}": value for name, value in plan[key].items()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(BillhookError, match=r"\.\./\.\./model|model\.layers\.0"):
        prune(pruned, plan=tmp_path / "plan.json", criterion="magnitude", output=tmp_path / "out")
    assert os.listdir(tmp_path) == ["plan.json"]


def test_links_are_followed_only_to_files(pruned, tmp_path):
    """Links are followed where they lead to files, as in the hub's cache; those that lead nowhere, in circles or to
    devices are not."""
    model = shutil.copytree(pruned, tmp_path / "model")
    (model / "there").symlink_to(model / "config.json")
    (model / "nowhere").symlink_to(tmp_path / "missing")
    (model / "circle").symlink_to(model)
    (model / "zero").symlink_to("/dev/zero")
    os.mkfifo(model / "pipe")
    out = prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "out").output
    assert not {"nowhere", "circle", "zero", "pipe"} & set(os.listdir(out))
    assert (out / "there").read_bytes() == (model / "config.json").read_bytes()
    assert not (out / "there").is_symlink()
    weights = sorted(model.glob("*.safetensors"))[0]
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(BillhookError, match="which is not in"):
        prune(model, sparsity=0.5, criterion="magnitude", output=tmp_path / "again")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": "1.0"}', "[" * 100_000, '{"model": {"type": "BPE", "vocab": 3}}']
)
def test_damaged_tokenizers_are_refused(text, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(BillhookError, match="tokenizer"):
        load_tokenizer(tmp_path)


FUZZ = """
import sys
sys.path[:0] = {paths!r}
import atheris
with atheris.instrument_imports(include=["billhook"]):
    import test_untrusted_files
from pathlib import Path
def one(data):
    test_untrusted_files.refused_or_read({name!r}, Path({folder!r}), data)
atheris.Setup([sys.argv[0], "-runs=2000", "-max_len=400", "-seed=1", {corpus!r}], one)
atheris.Fuzz()
"""


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["plan.json", "model.safetensors"])
def test_fuzzing_guided_by_coverage(name, pruned, tmp_path):
    pytest.importorskip("atheris")
    corpus, folder = tmp_path / "corpus", tmp_path / "place"
    corpus.mkdir()
    folder.mkdir()
    (corpus / "json").write_text(
        '{"version": 1, "weight_map": {"a": "b.safetensors"}, "target": 0.5, "pattern": "2:4", "layers": {"x": 0.5}}'
    )
    (corpus / "shard").write_bytes(
        bytes([51]) + bytes(7) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)
    )
    code = FUZZ.format(paths=[str(TESTS), str(TESTS / "faults")], name=name, folder=str(folder), corpus=str(corpus))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "Done 2000 runs" in ran.stderr
