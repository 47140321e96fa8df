"""What `slim` does not change keeps the bytes of the source, in whatever dtype the run computes."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from billhook.architectures.slicing import cuts_of, without
from billhook.architectures.stacks import blocks_of
from billhook.architectures.units import find_units
from billhook.steps.slim import slim
from billhook.steps.verify import verify
from billhook.store.files import read_json

pytestmark = pytest.mark.gate
IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
KEEPING = {"method": "magnitude", "calibration": IDS}  # what stays is as it was


def mixed(folder: Path, *dtypes: torch.dtype) -> None:
    """Store the blocks of a model file in turns in several dtypes, with values that are exact in none but the last."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        tensors[name] = (value.double() * (1 + 2**-30)).to(dtypes[block % len(dtypes)])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize(
    ("units", "dtypes", "computed"),
    [
        ("blocks", (torch.float32,), "bfloat16"),
        ("channels,heads", (torch.bfloat16, torch.float32), "bfloat16"),
        ("blocks", (torch.bfloat16, torch.float32), "bfloat16"),
        ("experts,channels", (torch.float32,), "bfloat16"),
        pytest.param("experts", (torch.float64,), "float32", marks=pytest.mark.nightly),
        pytest.param("channels", (torch.float64,), "float16", marks=pytest.mark.nightly),
        pytest.param("blocks,heads", (torch.float16, torch.float64), "float32", marks=pytest.mark.nightly),
    ],
)
def test_what_stays_has_the_bytes_of_the_source(tmp_path, units, dtypes, computed):
    source = tiny.save(tmp_path / "model", tiny.mixtral() if "experts" in units else tiny.llama(), words=False)
    mixed(source, *dtypes)
    experts = {"experts": "reap"} if "experts" in units else {}
    report = slim(source, 0.3, tmp_path / "out", units=units, dtype=computed, **KEEPING, **experts)
    assert verify(report.output).ok
    whole, small = opened(source), opened(report.output)
    kinds = [kind for kind in units.split(",") if kind != "blocks"]
    found = {unit.name: unit for unit in find_units(whole, kinds)}
    kept = {name: torch.isin(torch.arange(found[name].count), torch.tensor(k)) for name, k in report.kept.items()}
    cuts, state = cuts_of(found.values(), kept), small.state_dict()
    stays = [prefix for prefix in blocks_of(whole) if not dropped(report.output, prefix)]
    stored = [load_file(file) for file in sorted(report.output.glob("*.safetensors"))]
    assert len(stored) == len(stays) + 1
    for new, old in enumerate(stays):
        for name, value in whole.get_submodule(old).state_dict().items():
            expected = without(f"{old}.{name}", value, cuts)
            assert torch.equal(state[f"model.layers.{new}.{name}"], expected), f"{old}.{name}"
        assert {value.dtype for value in stored[new + 1].values()} == {dtypes[int(old[-1]) % len(dtypes)]}
    assert torch.equal(state["lm_head.weight"], whole.state_dict()["lm_head.weight"])


def dropped(folder: Path, prefix: str) -> bool:
    made_by = read_json(folder / "billhook.json", "record")["steps"][-1]["made_by"]
    return int(prefix.rpartition(".")[2]) in made_by["dropped"]
