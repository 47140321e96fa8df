"""The output of `billhook recover` never replaces a model that is read: the dense one, or one that is expanded."""

import hashlib
from pathlib import Path

import pytest
import tiny

from billhook import BillhookError, pack, prune, quantize, recover

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a model, and it pruned, packed and quantized."""
    folder = tmp_path_factory.mktemp("reads")
    tiny.text_file(folder / "text.txt", 30)
    tiny.save(folder / "model", tiny.llama(num_hidden_layers=1))
    prune(folder / "model", output=folder / "pruned", sparsity=0.5, criterion="magnitude", allocator="uniform")
    pack(folder / "pruned", folder / "packed")
    quantize(folder / "model", "int4/32", folder / "small", quantizer="round")
    return folder


def files(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


FEW = {"length": 32, "tokens": 32, "rate": 0.01, "batch_size": 1}
BY_BLOCK = {"length": 32, "by": "block"}
CASES = [
    ("pruned", "model", FEW),
    ("pruned", "model", FEW | {"objective": "text"}),  # which needs no dense model
    ("pruned", "model", BY_BLOCK),
    ("packed", "packed", FEW),
    ("packed", "packed/inside", FEW),
    ("packed", "packed", BY_BLOCK),
    ("small", "small", FEW),
]


@pytest.mark.parametrize(("model", "output", "fields"), CASES)
def test_a_model_that_is_read_is_not_replaced(place: Path, model: str, output: str, fields: dict) -> None:
    before = files(place)
    with pytest.raises(BillhookError, match=r"The output .* contains the (source|dense) model .* or is inside it"):
        recover(place / model, place / output, calibration=str(place / "text.txt"), overwrite=True, **fields)
    assert files(place) == before
