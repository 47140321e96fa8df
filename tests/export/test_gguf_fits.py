"""GGUF files of directories whose tensors are not exactly those of the model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf_families
import numpy as np
import pytest
import torch
from command import billhook
from safetensors.torch import load_file, save_file

from billhook.errors import BillhookError
from billhook.export.gguf import write_gguf
from billhook.store.gguf_file import read_gguf


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file."""
    file = read_gguf(path)
    return {name: file.values(entry) for name, entry in file.tensors.items()}


def edited(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object], **changes: object) -> Path:
    """A model of the family with other tensors in its file."""
    model = gguf_families.save(folder, name, **changes)
    stored = load_file(model / "model.safetensors")
    edit(stored)
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_tied_matrix_is_written_as_embedding_under_whichever_name_it_is_stored(tmp_path):
    def renamed(stored):
        stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")

    for name in ("llama", "gemma2"):
        usual = gguf_families.save(tmp_path / f"usual-{name}", name, tie_word_embeddings=True)
        other = edited(tmp_path / f"other-{name}", name, renamed, tie_word_embeddings=True)
        found = [tensors(write_gguf(m, tmp_path / f"{m.name}.gguf", rest="f32").path) for m in (usual, other)]
        assert found[0].keys() == found[1].keys()
        np.testing.assert_array_equal(found[0]["token_embd.weight"], found[1]["token_embd.weight"])


def test_a_head_beside_the_embedding_of_gemma_is_left_out_only_if_it_is_equal(tmp_path):
    def copied(stored):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()

    def own(stored):
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1

    assert "output.weight" not in tensors(
        write_gguf(edited(tmp_path / "equal", "gemma2", copied), tmp_path / "equal.gguf").path
    )
    with pytest.raises(BillhookError, match="with their embedding as head, and own has another one"):
        write_gguf(edited(tmp_path / "own", "gemma2", own), tmp_path / "own.gguf")


def test_a_tensor_that_the_model_lacks_is_named(tmp_path):
    for name, changes in (("lm_head.weight", {"tie_word_embeddings": False}), ("model.norm.weight", {})):
        model = edited(tmp_path / "model", "llama", lambda stored, name=name: stored.pop(name), **changes)
        ran = billhook("export", model, "-o", tmp_path / "model.gguf")
        assert (ran.code, f"the tensor {name} is missing" in ran.err) == (2, True), ran.err
        shutil.rmtree(model)
    assert list(tmp_path.iterdir()) == []
