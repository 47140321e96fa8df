"""A calibration text, or another file that is read, in the directory that an output replaces is never deleted."""

from pathlib import Path

import pytest
import tiny

from billhook import BillhookError, compress, prune, quantize, recover, search, slim
from billhook.steps.compress_units import compress as compress_with_units

pytestmark = pytest.mark.gate
BITS = {"bits": 6, "types": ("int4/16", "int8/16"), "target": "vllm"}
STEPS = {
    "prune": lambda model, **given: prune(model, sparsity=0.5, recipe="fast", **given),
    "prune --pack": lambda model, **given: prune(model, sparsity=0.5, recipe="fast", pack=True, **given),
    "search": lambda model, output, **given: search(model, 0.5, output=output.parent, criterion="wanda", **given),
    "slim": lambda model, **given: slim(model, 0.25, units="channels", **given),
    "quantize": lambda model, **given: quantize(model, "int4/16", **given),
    "recover": lambda model, **given: recover(model, tokens=32, **given),
    "compress": lambda model, **given: compress(model, **BITS, **given),
    "compress --units": lambda model, **given: compress_with_units(model, units="channels", **BITS, **given),
}
CASES = [
    (step, prefix) for step in STEPS for prefix in ("", "self:") if (step, prefix) != ("compress --units", "self:")
]


@pytest.mark.parametrize(("step", "prefix"), CASES)
def test_it_is_said_before_anything_is_computed(tmp_path: Path, step: str, prefix: str) -> None:
    model = tiny.save(tmp_path / "dense", tiny.llama(num_hidden_layers=1))
    (tmp_path / "old").mkdir()
    old = tiny.save(tmp_path / "old" / "model", tiny.llama(num_hidden_layers=1))
    tiny.text_file(old / "text.txt", 30)
    with pytest.raises(BillhookError, match=r"text.txt is read, and is in .*old.model, which would be replaced"):
        STEPS[step](model, output=old, calibration=f"{prefix}{old / 'text.txt'}", overwrite=True)
    assert (old / "text.txt").is_file()


@pytest.mark.parametrize("file", ["imatrix", "template"])
def test_nor_is_another_file_that_is_read(tmp_path: Path, file: str) -> None:
    model = tiny.save(tmp_path / "dense", tiny.llama(num_hidden_layers=1))
    old = tiny.save(tmp_path / "old", tiny.llama(num_hidden_layers=1))
    (old / "given.gguf").write_bytes(b"GGUF")
    with pytest.raises(BillhookError, match=r"given.gguf is read, and is in .*old, which would be replaced"):
        quantize(model, "q8_0", old, quantizer="round", overwrite=True, **{file: old / "given.gguf"})
