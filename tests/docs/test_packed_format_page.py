"""The packed format and what its commands print are as documented."""

import json
from pathlib import Path

import pytest
from command import done
from documentation import check_fields
from paths import DEMO

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    done("prune", DEMO, "--sparsity", 0.6, "--criterion", "magnitude", "-o", folder / "pruned")
    return folder


def test_files_and_outputs_have_exactly_the_documented_fields(place: Path) -> None:
    printed = done("pack", place / "pruned", "-o", place / "packed", "--json").json
    check_fields("pack --json", printed)
    record = json.loads((place / "packed" / "billhook_packed.json").read_text(encoding="utf-8"))
    check_fields("billhook_packed.json", record)
    check_fields("pack --json", done("pack", place / "pruned", "-o", place / "int8", "--values", "int8", "--json").json)
    check_fields("verify --json", done("verify", place / "packed", "--json").json)
    check_fields("unpack --json", done("unpack", place / "packed", "-o", place / "dense", "--json").json)
    check_fields("export --json", done("export", place / "dense", "-o", place / "dense.gguf", "--json").json)
    check_fields("generate --json", done("generate", place / "packed", "import", "--max-new-tokens", 3, "--json").json)


def test_a_benchmark_has_exactly_the_documented_fields(place: Path) -> None:
    done("pack", place / "pruned", "-o", place / "small")
    done("pack", place / "pruned", "-o", place / "smaller", "--values", "int8")
    cells = ["--batch", "1,2", "--prompt", "4", "--new", "3", "--rounds", "2"]
    printed = done(
        "bench",
        place / "small",
        place / "smaller",
        "--against",
        place / "pruned",
        *cells,
        "--picture",
        place / "x.svg",
        "--json",
    ).json
    check_fields("bench --json", printed)
    assert [model["name"] for model in printed["models"]] == ["pruned", "small", "smaller"]
    assert [[(c["batch"], c["prompt"]) for c in model["cells"]] for model in printed["models"]] == [
        [(1, 4), (2, 4)]
    ] * 3
    dense, small, smaller = printed["models"]
    assert smaller["file_bytes"] < small["file_bytes"] < dense["file_bytes"]
    assert dense["sparsity"] is None
    assert dense["cells"][0]["decode_speedup"] is None
    assert small["sparsity"] == pytest.approx(0.6, abs=1e-3)
    for model in (small, smaller):
        for cell, base in zip(model["cells"], dense["cells"], strict=True):
            for kind in ("prefill", "decode"):
                assert 0 < cell[kind]["low"] <= cell[kind]["median"] <= cell[kind]["high"]
                ratio = cell[f"{kind}_speedup"]  # within the ratios of the extremes of two rounds
                assert ratio["low"] <= ratio["median"] <= ratio["high"]
                assert 0.2 < ratio["median"] / (cell[kind]["median"] / base[kind]["median"]) < 5
    assert "packed against dense" in (place / "x.svg").read_text(encoding="utf-8")
