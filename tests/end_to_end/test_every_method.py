"""Every criterion and allocator with every kind of pattern, on odd shapes and on models that are sparse already."""

import pytest
import tiny
from command import billhook, done
from pruning import prune

from billhook.architectures.layers import find_layers
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.registry import Registry

pytestmark = pytest.mark.gate


def fast_for(chosen: tuple[str, ...], *more: str, of: Registry = CRITERIA) -> list:
    """Every criterion or other method, with `more` arguments; the fast suite runs the `chosen` ones."""
    return [pytest.param(x, *more, marks=[] if x in chosen else [pytest.mark.nightly]) for x in of.names()]


@pytest.mark.parametrize(
    ("criterion", "pattern"),
    [
        *fast_for(tuple(CRITERIA.names()), "unstructured"),
        *fast_for(("wanda", "gblm"), "2:4"),
        *fast_for(("sparsegpt", "dsnot"), "3:8"),
    ],
)
def test_every_criterion_with_every_kind_of_pattern(place, tmp_path, criterion, pattern):
    sparsity = {"unstructured": 0.7, "2:4": 0.5, "3:8": 0.625}[pattern]
    arguments = ["--sparsity", "0.7"] if pattern == "unstructured" else ["--pattern", pattern]
    report = prune(place, tmp_path / "pruned", "--criterion", criterion, *arguments, model="experts")
    assert report["sparsity"] == pytest.approx(sparsity, abs=1 / 4000)
    assert done("verify", tmp_path / "pruned", "--json").json["ok"]


@pytest.mark.parametrize(
    ("allocator", "pattern"),
    [(x, "unstructured") for x in ALLOCATORS.names()] + fast_for(("uniform", "owl", "atp"), "2:4", of=ALLOCATORS),
)
def test_every_allocator_with_every_kind_of_pattern(place, tmp_path, allocator, pattern):
    arguments = ["--sparsity", "0.5"] if pattern == "unstructured" else ["--pattern", pattern]
    report = prune(place, tmp_path / "pruned", "--allocator", allocator, "--criterion", "magnitude", *arguments)
    assert report["sparsity"] == pytest.approx(0.5, abs=0.02 if arguments[0] == "--pattern" else 1e-3)
    assert done("verify", tmp_path / "pruned", "--json").json["ok"]


@pytest.mark.nightly
def test_nothing_to_remove_removes_nothing(place, tmp_path):
    for criterion in CRITERIA.names():
        report = prune(place, tmp_path / criterion, "--criterion", criterion, "--sparsity", "0")
        assert report["sparsity"] == 0
        for file in (place / "model").glob("*.safetensors"):
            assert (tmp_path / criterion / file.name).read_bytes() == file.read_bytes()


def test_a_sparse_model_is_pruned_further_and_never_filled(place, pruned, tmp_path):
    report = prune(place, tmp_path / "more", "--sparsity", "0.8", model="pruned")
    assert report["sparsity"] == pytest.approx(0.8, abs=1e-4)
    report = prune(place, tmp_path / "less", "--sparsity", "0.2", "--criterion", "sparsegpt", model="pruned")
    assert report["sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert "more zeros than planned" in report["warnings"][0]
    assert done("verify", tmp_path / "less", "--json").json["ok"]


def test_published_rounding_counts_zeros_as_published(place, tmp_path):
    report = prune(place, tmp_path / "floor", "--published", "--sparsity", "0.33", model="experts")
    assert all(layer["zeros"] == 0 or layer["sparsity"] <= 0.33 for layer in report["layers"].values())
    assert report["layers"]["model.layers.0.self_attn.q_proj"]["zeros"] == 32 * int(32 * 0.33)
    assert done("verify", tmp_path / "floor", "--json").json["ok"]


@pytest.fixture(scope="module")
def odd(place) -> int:
    """A model of odd shapes beside the others; the number of its prunable weights."""
    model = tiny.llama(
        hidden_size=36, num_attention_heads=3, num_key_value_heads=1, intermediate_size=53, num_hidden_layers=2
    )
    tiny.save(place / "odd", model)
    return sum(out * columns for out, columns in (layer.shape for layer in find_layers(model)))


@pytest.mark.parametrize("criterion", fast_for(("magnitude", "sparsegpt", "wandapp")))
def test_layers_of_odd_shapes_are_pruned(place, odd, criterion, tmp_path):
    report = prune(place, tmp_path / "pruned", "--criterion", criterion, "--sparsity", "0.37", model="odd")
    assert sum(layer["zeros"] for layer in report["layers"].values()) == round(0.37 * odd)


def test_patterns_that_do_not_divide_odd_shapes_are_refused(place, odd, tmp_path):
    message = billhook(
        "prune", place / "odd", "--output", tmp_path / "x", "--criterion", "magnitude", "--pattern", "2:4"
    ).err
    assert "2:4 is impossible for model.layers.0.mlp.down_proj: its 53 columns do not divide by 4" in message
