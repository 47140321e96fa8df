"""Analysis: errors of block outputs against an obvious calculation, and the command."""

import json
from pathlib import Path

import pytest
import torch
from tiny import llama, save, text_file
from typer.testing import CliRunner

from billhook import BillhookError, allocate, find_layers, measure
from billhook.analysis import analyze
from billhook.cli import app

TOKENS = torch.randint(258, (8, 32), generator=torch.Generator().manual_seed(1))


def test_errors_grow_from_the_first_block_and_the_model_is_restored():
    model = llama()
    before = [layer.weight.clone() for layer in find_layers(model)]
    rows = measure(model, [])
    plans = {f"{s}": allocate(rows, s) for s in (0.0, 0.3, 0.6)}
    found = analyze(model, plans, calibration=TOKENS, criterion="wanda")
    none, some, more = (found["plans"][name]["relative_error"] for name in plans)
    assert none == pytest.approx([0.0] * 4, abs=1e-9)
    assert len(some) == 4
    assert all(0 < a < b for a, b in zip(some, more, strict=True))
    assert found["plans"]["0.3"]["sparsity"] == pytest.approx([0.3] * 4)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, find_layers(model), strict=True))


def test_only_the_first_block_pruned():
    """The blocks after it are dense, and the error they pass on is that of their input."""
    model = llama()
    plan = allocate(measure(model, []), 0.0)
    plan.sparsity.update({name: 1.0 for name in plan.sparsity if name.startswith("model.layers.0.")})
    found = analyze(model, {"plan": plan}, calibration=TOKENS)["plans"]["plan"]
    assert found["sparsity"] == [1.0, 0.0, 0.0, 0.0]
    with torch.no_grad():
        hidden = [model(row[None], output_hidden_states=True).hidden_states for row in TOKENS]
    # A block without weights adds nothing: its output is its input, here the embeddings.
    errors = {float((h[0] - h[1]).square().sum() / h[1].square().sum()) for h in hidden}
    assert min(errors) <= found["relative_error"][0] <= max(errors)


def test_mistakes():
    with pytest.raises(BillhookError, match="which plans"):
        analyze(llama(), {}, calibration=TOKENS)
    with pytest.raises(BillhookError, match="not for this model"):
        analyze(llama(), {"other": allocate(measure(llama(num_hidden_layers=3), []), 0.5)}, calibration=TOKENS)


def test_command(tmp_path: Path):
    model, text = save(tmp_path / "model"), text_file(tmp_path / "text.txt")
    allocate(measure(llama(), []), 0.5).save(tmp_path / "plan.json")
    arguments = [
        "analyze",
        str(model),
        f"--plan={tmp_path / 'plan.json'}",
        f"--calibration={text}",
        "--samples=4",
        "--length=32",
    ]
    ran = CliRunner().invoke(app, [*arguments, f"-o{tmp_path / 'analysis.json'}", "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "analysis.json").read_text()) == json.loads(ran.stdout)
    assert CliRunner().invoke(app, arguments).exit_code == 0
