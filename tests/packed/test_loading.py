"""Loaded packed models give the results of the dense ones, through everything that accepts a transformers model."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, build
from sparse_models import prune_at_random
from torch import nn

import billhook
from billhook import BillhookError, load, load_model, pack
from billhook.runtime.linear import SparseLinear

# layers that stay packed where experts are expanded
DENSE = {"mixtral": 16, "qwen3_moe": 16, "gpt_oss": 16, "llama4_text": 28}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_the_dense_model(family: str, tmp_path: Path) -> None:
    model = prune_at_random(build(family))
    model.save_pretrained(tmp_path / "dense")
    report = pack(tmp_path / "dense", tmp_path / "packed")
    notes: list[str] = []
    packed, dense = load(tmp_path / "packed", tune=False, note=notes.append), load_model(tmp_path / "dense")
    sparse = [module for module in packed.modules() if isinstance(module, SparseLinear)]
    expected = DENSE.get(family, len(report.layers))
    assert len(sparse) == expected
    assert len(notes) == (expected < len(report.layers))
    assert not any(type(m) is nn.Linear and ((m.weight == 0).float().mean() > 0.3) for m in packed.modules())
    ids = torch.randint(2, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert packed.config.to_dict().keys() == dense.config.to_dict().keys()


def test_packed_models_with_tied_embeddings_generate(place: Path) -> None:
    packed, dense = (load(place / "packed", dtype="bfloat16"), load_model(place / "dense", dtype="bfloat16"))
    assert packed.dtype == torch.bfloat16
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert packed.generation_config.to_dict() == dense.generation_config.to_dict()
    ids = torch.tensor([[256, 70, 71, 72]])
    same = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    a, b = (model.float().generate(ids, **same) for model in (packed, dense))
    assert a.equal(b)
    assert load(place / "dense").state_dict().keys() == dense.state_dict().keys()  # a dense directory loads as ever


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("values", ["stored", "int8"])
def test_other_dtypes(place: Path, tmp_path: Path, dtype: str, values: Any) -> None:
    pack(place / "dense", tmp_path / "packed", values=values)
    billhook.unpack(tmp_path / "packed", tmp_path / "dense")
    packed, dense = load(tmp_path / "packed", dtype=dtype, tune=False), load_model(tmp_path / "dense", dtype="float32")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        a, b = packed(ids).logits, dense(ids).logits
    assert packed.dtype == a.dtype == getattr(torch, dtype)
    scale = float(b.abs().max())
    assert float((a.float() - b).abs().max()) < (0.03 if dtype != "float32" or values == "int8" else 1e-4) * scale


def test_nothing_is_copied_or_converted(place: Path) -> None:
    """The tensors of the layers are in the memory mapping of the file."""
    model = load(place / "packed", tune=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}
    regions = [
        line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.packed.safetensors" in line
    ]
    ranges = [tuple(int(x, 16) for x in region[0].split("-")) for region in regions]
    assert len(layers) == 21
    for layer in layers.values():
        for tensor in (layer.bitmask, layer.values):
            assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)


def test_the_file_is_never_written(place: Path) -> None:
    before = (place / "packed" / "model.packed.safetensors").read_bytes()
    model = load(place / "packed", tune=False)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    assert (place / "packed" / "model.packed.safetensors").read_bytes() == before


def test_a_state_dict_is_loaded_again(place: Path, tmp_path: Path) -> None:
    model, ids = load(place / "packed", tune=False), torch.arange(20)[None]
    other = tiny.save(tmp_path / "other", prune_at_random(tiny.llama(seed=5), 0.5), dtype=torch.bfloat16)
    pack(other, tmp_path / "packed")
    twin = load(tmp_path / "packed", tune=False)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        expected = model(ids).logits
        assert not twin(ids).logits.equal(expected)
        result = twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert twin(ids).logits.equal(expected)
        assert copy.deepcopy(model)(ids).logits.equal(expected)
        assert pickle.loads(pickle.dumps(model))(ids).logits.equal(expected)
    assert not result.missing_keys
    assert not result.unexpected_keys


def test_a_bad_state_dict_is_refused(place: Path) -> None:
    model = load(place / "packed", tune=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(name for name in state if name.endswith("bitmask"))
    state[name][0] = 255
    with pytest.raises((BillhookError, RuntimeError)):
        model.load_state_dict(state)


def test_impossible_requests_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BillhookError,
        match="A packed model cannot be written with save_pretrained: copy its directory, or make a dense",
    ):
        load(place / "packed", tune=False).save_pretrained(tmp_path / "out")
    for call in (load_model, lambda path: billhook.prune(path, sparsity=0.5, criterion="magnitude")):
        with pytest.raises(BillhookError, match=r"packed is packed, .*: unpack it first, billhook unpack"):
            call(place / "packed")
    with pytest.raises(BillhookError, match="Unknown dtype 'int4'"):
        load(place / "packed", dtype="int4")
    with pytest.raises(BillhookError, match="There is no model directory at"):
        load(tmp_path / "nothing")


def test_stock_transformers_does_not_take_it_for_a_dense_model(place: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="no file named model"):
        AutoModelForCausalLM.from_pretrained(place / "packed")


@pytest.mark.parametrize(
    ("change", "match"),
    [({"hidden_size": 64}, "config.json is not the file that was packed"), ({}, "has no config.json")],
    ids=["changed", "missing"],
)
def test_a_configuration_that_does_not_fit_is_refused(
    place: Path, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    import shutil

    folder = shutil.copytree(place / "packed", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    if change:
        (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BillhookError, match=match):
        load(folder)


def test_shapes_are_compared_with_the_configuration(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model", prune_at_random(tiny.llama()))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    pack(source, tmp_path / "packed")  # a packed file needs no architecture
    with pytest.raises(BillhookError, match=r"does not fit its config.json: the tensor .* has another shape"):
        load(tmp_path / "packed")


def test_a_packed_model_runs_in_a_pipeline_of_transformers(place: Path) -> None:
    from transformers import pipeline

    texts = [
        pipeline("text-generation", model=model, tokenizer=tiny.tokenizer())(
            "The quick", max_new_tokens=6, do_sample=False
        )
        for model in (load(place / "packed", dtype="float32"), load_model(place / "dense", dtype="float32"))
    ]
    assert texts[0] == texts[1]


def test_a_packed_model_is_scored_by_lm_eval(place: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    found = []
    for model in (load(place / "packed", dtype="float32"), load_model(place / "dense", dtype="float32")):
        wrapped = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=1, max_length=64)
        found.append(
            wrapped.loglikelihood([Instance("loglikelihood", {}, ("The quick", " brown"), 0)], disable_tqdm=True)[0][0]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4)
