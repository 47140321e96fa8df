"""The weights that are pruned are those that `transformers` reads, whatever else is in the directory."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from command import contents
from transformers import AutoModelForCausalLM

from billhook import BillhookError, load_model, pack, prune, unpack
from billhook.engine.streaming import open_streamed
from billhook.steps.export import export_dense
from billhook.steps.slim import slim
from billhook.steps.verify import verify
from billhook.store.shards import INDEX, SINGLE, weight_files
from billhook.store.sinks import SameLayout


def both(folder: Path) -> Path:
    """A single file, and the shards of other weights with their index."""
    tiny.save(folder, tiny.llama(seed=1), shard="60KB")
    tiny.llama(seed=2).save_pretrained(folder.parent / "other")
    (folder.parent / "other" / SINGLE).rename(folder / SINGLE)
    return folder


def stale_index(folder: Path) -> Path:
    """A single file, and an index whose shards are not there."""
    for shard in both(folder).glob("model-*"):
        shard.unlink()
    return folder


def configured(folder: Path, name: str) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    return folder


def named_file(folder: Path) -> Path:
    """Another file, named in config.json, beside all of the above."""
    (both(folder) / SINGLE).rename(folder / "other.safetensors")
    tiny.llama(seed=3).save_pretrained(folder.parent / "third")
    (folder.parent / "third" / SINGLE).rename(folder / SINGLE)
    return configured(folder, "other.safetensors")


def named_index(folder: Path) -> Path:
    """Another index, named in config.json."""
    (both(folder) / INDEX).rename(folder / "own.safetensors.index.json")
    return configured(folder, "own.safetensors.index.json")


LAYOUTS = [both, stale_index, named_file, named_index]


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.gate
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_values_are_those_of_from_pretrained_before_and_after_pruning(layout, tmp_path: Path) -> None:
    source, out = layout(tmp_path / "m"), tmp_path / "out"
    expected = values(AutoModelForCausalLM.from_pretrained(source))
    stream = open_streamed(source)
    for index in range(len(stream.blocks)):
        stream.load(index, stream.stored)
    assert same(values(stream.model), expected)
    assert same(values(load_model(source)), expected)
    prune(source, sparsity=0.5, criterion="magnitude", output=out)
    assert verify(out, source=source).ok
    pruned = values(AutoModelForCausalLM.from_pretrained(out))
    assert all(bool(((pruned[name] == expected[name]) | (pruned[name] == 0)).all()) for name in expected)
    assert {path.name for path in out.glob("*.safetensors")} == {path.name for path in weight_files(source)}
    assert len(list(out.glob("*.index.json"))) == (layout is named_index)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_in_another_layout_open(layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = layout(tmp_path / "m")
    monkeypatch.setattr(SameLayout, "mismatch", lambda sink: "made up")
    prune(source, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
    assert verify(tmp_path / "out").ok
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.gate
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_and_decoding_read_the_same_files(layout, tmp_path: Path) -> None:
    source, pruned = layout(tmp_path / "m"), tmp_path / "pruned"
    prune(source, sparsity=0.5, criterion="magnitude", output=pruned)
    unpack(pack(pruned, tmp_path / "packed").output, tmp_path / "unpacked")
    assert contents(tmp_path / "unpacked") == contents(pruned)
    export_dense(source, tmp_path / "dense", kind="f32")
    expected = values(AutoModelForCausalLM.from_pretrained(source))
    assert same(values(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


@pytest.mark.gate
def test_a_smaller_model_is_written_where_the_configuration_named_a_file(tmp_path: Path) -> None:
    slim(named_file(tmp_path / "m"), 0.25, tmp_path / "small", units="channels", method="magnitude")
    assert verify(tmp_path / "small").ok
    AutoModelForCausalLM.from_pretrained(tmp_path / "small")


@pytest.mark.parametrize("name", ["adapter_model.bin", "sub/a.safetensors", "missing.safetensors", 1])
def test_a_name_in_the_configuration_that_cannot_be_read_is_refused(name, tmp_path: Path) -> None:
    source = configured(tiny.save(tmp_path / "m"), name)
    with pytest.raises(BillhookError, match=r"config\.json.*(transformers_weights|missing\.safetensors|sub/a)"):
        prune(source, sparsity=0.5, criterion="magnitude", output=tmp_path / "out")
