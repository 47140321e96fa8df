"""Arguments of wrong types are refused by name, at once."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import billhook
from billhook import BillhookError
from billhook.steps.compress import CompressRequest
from billhook.steps.evaluate import EvalConfig
from billhook.steps.inputs import UNCHECKED
from billhook.steps.prune_job import PruneRequest
from billhook.steps.quantize_job import QuantizeRequest
from billhook.steps.recover_job import RecoverRequest
from billhook.steps.slim_job import SlimRequest

NEEDED: dict[type, dict[str, Any]] = {
    PruneRequest: {"model": "m"},
    QuantizeRequest: {"model": "m", "type": "q4_k", "output": "o"},
    CompressRequest: {"model": "m", "output": "o"},
    SlimRequest: {"model": "m", "output": "o"},
    RecoverRequest: {"model": "m", "output": "o"},
    EvalConfig: {},
}


@pytest.mark.parametrize("kind", NEEDED)
def test_every_field_of_a_request_is_checked(kind):
    kind(**NEEDED[kind])
    checked = {item.name for item in fields(kind)} - {*UNCHECKED}
    for name in checked:
        with pytest.raises(BillhookError, match=rf"^{name}=<object .* must be "):
            kind(**(NEEDED[kind] | {name: object()}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"samples": "4"}, r"^samples='4' must be a whole number\.$"),
        ({"samples": True}, r"^samples=True must be a whole number\.$"),
        ({"batch_size": "4"}, r"^batch_size='4' must be a whole number or None\.$"),
        ({"pattern": (2, 4)}, r"^pattern=\(2, 4\) must be a string\.$"),
        ({"targets": [None]}, r"^targets=\[None\] must be a string or a list \(of each item: a string\)\.$"),
        ({"output": 5}, r"^output=5 must be a string or a path or None\.$"),
        ({"criterion": 3}, r"^criterion=3 must be a string\.$"),
        ({"options": {1: 2}}, r"^options=\{1: 2\} must be a mapping\.$"),
        ({"refine": "all"}, r"^refine='all' must be one of none, blocks, blocks\+norms\.$"),
        ({"plan": {}}, r"^plan=\{\} must be a string or a path or a Plan or None\.$"),
    ],
    ids=str,
)
def test_what_is_said(changes, message):
    with pytest.raises(BillhookError, match=message):
        PruneRequest("m", **changes)


def test_numbers_of_numpy_and_paths_are_accepted():
    PruneRequest("m", samples=np.int64(4), sparsity=np.float32(0.5), spill_gib=1, output=Path("o"), targets=("a", "b"))


def test_equivalents_of_torch_numpy_and_python_take_the_annotated_form():
    given = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "overwrite": np.True_, "targets": {"b", "a"}}
    found = PruneRequest("m", ignore=np.array(["c"]), **given)
    assert (found.dtype, found.device, found.overwrite) == ("bfloat16", "cpu", True)
    assert (found.targets, found.ignore) == (["a", "b"], ["c"])
    EvalConfig(data="t", against=Path("m"), tasks={Path("t.jsonl")})


def test_verify_needs_a_directory():
    with pytest.raises(BillhookError, match=r"^directory=None must be a string or a path\.$"):
        billhook.verify(None)
