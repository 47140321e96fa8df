"""Importance matrices: the sums of squared inputs of every weight, under its name in GGUF files."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from command import billhook, done
from documentation import check_fields
from safetensors.torch import save_file
from transformers import PreTrainedModel


def measured(folder: Path, model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Four windows of 32 tokens, and the tensors of the importance matrix of a model on them."""
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(1))
    tiny.save(folder / "model", model)
    save_file({"tokens": ids}, folder / "tokens.safetensors")
    text = ("--calibration", folder / "tokens.safetensors", "--samples", "4", "--length", "32")
    ran = done("imatrix", folder / "model", "-o", folder / "imatrix.gguf", *text, "--json")
    check_fields("imatrix --json", ran.json)
    reader = gguf.GGUFReader(folder / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    assert reader.fields["imatrix.datasets"].contents() == ["tokens.safetensors"]
    return ids, {tensor.name: tensor.data for tensor in reader.tensors}


def squares(model: PreTrainedModel, name: str, ids: torch.Tensor) -> np.ndarray:
    """The sum of the squared inputs of a module."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen).flatten(0, -2).square().sum(0).numpy()


def test_every_weight_has_the_sum_of_its_squared_inputs_and_the_number_of_tokens(tmp_path):
    model = tiny.llama()
    ids, found = measured(tmp_path, model)
    assert len(found) == 2 * 3 * 7
    for name, module in {"blk.0.attn_q": "0.self_attn.q_proj", "blk.2.ffn_down": "2.mlp.down_proj"}.items():
        expected = squares(model, f"model.layers.{module}", ids)
        np.testing.assert_allclose(found[f"{name}.weight.in_sum2"], expected[None], rtol=1e-4)
        assert found[f"{name}.weight.counts"].tolist() == [[4 * 32]]


def test_experts_have_a_row_each_for_the_tokens_that_reach_them(tmp_path):
    model = tiny.mixtral()
    ids, found = measured(tmp_path, model)
    sums, counts = found["blk.1.ffn_gate_exps.weight.in_sum2"], found["blk.1.ffn_gate_exps.weight.counts"]
    assert (sums.shape, counts.shape) == ((4, 32), (4, 1))
    assert counts.sum() == 2 * 4 * 32  # two experts for each token
    np.testing.assert_allclose(sums.sum(axis=0), 2 * squares(model, "model.layers.1.mlp", ids), rtol=1e-4)
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight.in_sum2"], sums)


def test_a_model_without_names_is_refused_before_anything_is_measured(place):
    import gguf_families

    gguf_families.save(Path("granite"), "granite")
    ran = billhook(
        "imatrix", "granite", "-o", "x.gguf", "--calibration", "text.txt", "--samples", "4", "--length", "32"
    )
    assert (ran.code, "No GGUF names are known for granite" in ran.err) == (2, True)
    assert not Path("x.gguf").exists()


@pytest.mark.parametrize("model", ["model.gguf", "model-00001-of-00002.gguf", "folder"])
def test_the_file_of_the_model_is_not_replaced(place, model):
    Path("folder").mkdir()
    for name in ("model.gguf", "model-00001-of-00002.gguf", "model-00002-of-00002.gguf", "folder/model.gguf"):
        Path(name).write_bytes(b"GGUF")
    output = {"model-00001-of-00002.gguf": "model-00002-of-00002.gguf", "folder": "folder/model.gguf"}.get(model, model)
    ran = billhook("imatrix", model, "-o", output, "--calibration", "text.txt")
    assert (ran.code, f"The output {output} is a file of the model, or one that is read" in ran.err) == (2, True)
    assert Path(output).read_bytes() == b"GGUF"
