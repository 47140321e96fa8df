"""A file of gradients says what it is, prunes like computed gradients, and is refused where it does not fit."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY
from safetensors.torch import load_file, save_file
from tiny import llama, save
from typer.testing import CliRunner

from billhook import BillhookError, Plan, find_layers, prune, prune_
from billhook.cli import app
from billhook.engine import gradients as engine_gradients
from billhook.engine.gradient_file import open_gradients
from billhook.plan.spec import Pattern
from billhook.tasks.text_generation import TASK

compute_gradients = functools.partial(engine_gradients.compute_gradients, loss=TASK.loss)


Tensor = torch.Tensor


def batches(count: int = 2, size: int = 2, length: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCABULARY, (size, length), generator=generator) for _ in range(count)]


def test_the_file_is_read_by_stock_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "g.safetensors"
    found = compute_gradients(llama(), batches(), "gradient_l1_reference", path)
    stock = load_file(path)
    assert all(
        torch.equal(value.float(), found[name]) and value.dtype == torch.float16 for name, value in stock.items()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one, token windows, and gradients of the first."""
    folder = tmp_path_factory.mktemp("gradients")
    save(folder / "model")
    save(folder / "other", llama(seed=1))
    save_file({"tokens": torch.cat(batches(2, 2)).int()}, folder / "tokens.safetensors")
    made = run("gradients", folder / "model", "-o", folder / "g.safetensors", *text(folder), "--json")
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert facts == {"output": str(folder / "g.safetensors"), "statistic": "gradient_l1", "layers": 21, "samples": 4}
    return folder


def run(*arguments: Any) -> Any:
    """The result of a command; `exit_code` is the one that `main` gives for an error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    result.exit_code = getattr(result.exception, "exit_code", result.exit_code)
    return result


def text(folder: Path) -> list[str]:
    return ["--calibration", str(folder / "tokens.safetensors"), "--samples", "4", "--length", "20"]


def gblm(folder: Path, output: Path, *arguments: Any) -> Any:
    return run(
        "prune", folder / "model", "--criterion", "gblm", "--sparsity", "0.5", "-o", output, *text(folder), *arguments
    )


def test_given_gradients_prune_like_computed_ones(folder: Path, tmp_path: Path) -> None:
    for name, arguments in {"computed": [], "given": ["--gradients", folder / "g.safetensors"]}.items():
        result = gblm(folder, tmp_path / name, *arguments)
        assert result.exit_code == 0, result.output
    computed, given = (load_file(tmp_path / name / "model.safetensors") for name in ("computed", "given"))
    assert all(torch.equal(computed[name], given[name]) for name in computed)
    record = json.loads((tmp_path / "given" / "billhook.json").read_text(encoding="utf-8"))
    record = record["steps"][0]["made_by"]["gradients"]
    assert record["statistic"] == "gradient_l1"
    assert record["calibration"]["samples"] == 4


def test_gradients_alone_need_no_text(folder: Path, tmp_path: Path) -> None:
    arguments = ["prune", folder / "model", "--criterion", "gradient", "--sparsity", "0.5"]
    result = run(*arguments, "-o", tmp_path / "a", "--gradients", folder / "g.safetensors")
    assert result.exit_code == 0, result.output
    result = run(*arguments, "-o", tmp_path / "b", *text(folder))
    assert result.exit_code == 0, result.output
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    result = run(*arguments, "-o", tmp_path / "c")
    assert result.exit_code == 2
    assert "--calibration" in result.output


def damaged(kind: str, folder: Path, path: Path) -> Path:
    """A copy of the gradients with one thing wrong."""
    source = folder / "g.safetensors"
    shutil.copy(source, path)
    tensors = load_file(source)
    about = open_gradients(source).about
    metadata = {"format": "billhook gradients", "version": "1", "about": json.dumps(about)}
    if kind == "truncated":
        path.write_bytes(source.read_bytes()[:-100])
    elif kind == "stub":
        path.write_bytes(b"abc")
    elif kind == "missing":
        path.unlink()
    elif kind == "foreign":
        save_file(tensors, path)
    elif kind == "version":
        save_file(tensors, path, metadata | {"version": "9"})
    elif kind == "metadata":
        save_file(tensors, path, metadata | {"about": "[]"})
    elif kind == "layer":
        del tensors["model.layers.1.mlp.up_proj"]
        save_file(tensors, path, metadata)
    elif kind == "shape":
        tensors["model.layers.1.mlp.up_proj"] = tensors["model.layers.1.mlp.up_proj"].T.contiguous()
        save_file(tensors, path, metadata)
    elif kind == "dtype":
        tensors["model.layers.1.mlp.up_proj"] = tensors["model.layers.1.mlp.up_proj"].double()
        save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "header promises"),
        ("stub", "not a safetensors file"),
        ("missing", "no gradients file"),
        ("foreign", "another kind"),
        ("version", "version '9'"),
        ("metadata", "damaged gradients file"),
        ("layer", "no gradients of model.layers.1.mlp.up_proj"),
        ("shape", "32 x 64 gradients for model.layers.1.mlp.up_proj"),
        ("dtype", "model.layers.1.mlp.up_proj is F64"),
    ],
)
def test_a_bad_file_is_refused(kind: str, message: str, folder: Path, tmp_path: Path) -> None:
    path = damaged(kind, folder, tmp_path / "bad.safetensors")
    result = gblm(folder, tmp_path / "out", "--gradients", path)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_stale_and_unfitting_gradients_are_refused(folder: Path, tmp_path: Path) -> None:
    given = ["--gradients", folder / "g.safetensors"]
    other = run(
        "prune",
        folder / "other",
        "--criterion",
        "gblm",
        "--sparsity",
        "0.5",
        "-o",
        tmp_path / "out",
        *text(folder),
        *given,
    )
    norm = gblm(folder, tmp_path / "out", *given, "--set", "norm=l2")
    mode = gblm(folder, tmp_path / "out", *given, "--set", "mode=reference")
    wanda = run(
        "prune",
        folder / "model",
        "--sparsity",
        "0.5",
        "--criterion",
        "wanda",
        "-o",
        tmp_path / "out",
        *text(folder),
        *given,
    )
    for result, message in (
        (other, "gradients of model, whose weights are not those of other"),
        (norm, "holds gradient_l1, and the criterion reads gradient_l2"),
        (mode, "holds gradient_l1, and the criterion reads gradient_l1_reference"),
        (wanda, "wanda reads no gradients"),
    ):
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not (tmp_path / "out").exists()


def test_gradients_given_in_python_are_checked(folder: Path) -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = Plan.of_sparsities(0.5, Pattern(), {layer.name: 0.5 for layer in find_layers(model)})
    with pytest.raises(BillhookError, match="reads gradient_l2"):
        prune_(model, plan, criterion="gradient", norm="l2", gradients=open_gradients(folder / "g.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = prune(model, sparsity=0.5, criterion="gradient", gradients=folder / "g.safetensors")
    assert report.sparsity == 0.5


def test_nothing_is_written_when_the_model_is_not_there(folder: Path, tmp_path: Path) -> None:
    result = run("gradients", tmp_path / "no", "-o", tmp_path / "g.safetensors", *text(folder))
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())
