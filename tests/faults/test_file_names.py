"""Names of files and folders may hold bytes that are not UTF-8: they are recorded as json escapes, and found again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from command import billhook, contents, done

from billhook.store.files import encoded, json_text, write_text

NAME = os.fsdecode(b"caf\xe9")


def test_what_is_written_is_utf8_and_json_gives_the_names_back(tmp_path: Path) -> None:
    value = {NAME: [NAME, "café €"]}
    for text in (json_text(value), json_text(value, indent=None)):
        assert json.loads(text) == value
        assert json.loads(encoded(text)) == value
        assert "café €" in text
    write_text(tmp_path / f"{NAME}.txt", f"About {NAME}")
    assert (tmp_path / f"{NAME}.txt").read_text(encoding="utf-8") == r"About caf\udce9"


@pytest.mark.nightly
def test_models_texts_and_files_of_any_name_go_through_all_steps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, text = tiny.save(Path("model")), tiny.text_file(Path(f"t-{NAME}.txt"), 40)
    (model / f"{NAME}.txt").write_bytes(b"x")
    calibration = ("--calibration", text, "--samples", "4", "--length", "32")
    pruned = "pruned"
    done(
        "prune",
        model,
        "--sparsity",
        "0.5",
        *calibration,
        "--criterion",
        "wanda",
        "-o",
        pruned,
        "--log-file",
        "log.jsonl",
    )
    record = json.loads(Path(pruned, "billhook.json").read_text(encoding="utf-8"))
    assert f"{NAME}.txt" in record["files"]
    assert done("verify", pruned, "--source", model, "--json").json["problems"] == []
    done("report", pruned)
    done("eval", pruned, "--data", text, "--json")
    done("pack", pruned, "-o", "packed")
    done("unpack", "packed", "-o", "unpacked")
    assert contents(Path("unpacked")).keys() == contents(Path(pruned)).keys()
    done("quantize", model, "--type", "int4", *calibration, "-o", "quantized")
    done("export", "quantized", "--to", "dense", "-o", "dense")
    done("export", model, "--to", "gguf", "-o", "model.gguf")


@pytest.mark.nightly
@pytest.mark.gate
def test_folders_of_any_name_are_printed_and_pruned(tmp_path: Path) -> None:
    tiny.save(tmp_path / NAME, words=False)
    out = tmp_path / f"pruned-{NAME}"
    done("prune", tmp_path / NAME, "--sparsity", "0.5", "--criterion", "magnitude", "-o", out, "--json")
    verify = [sys.executable, "-m", "billhook", "verify", out, "--json"]
    found = json.loads(subprocess.run(verify, capture_output=True, check=True).stdout)
    assert found["problems"] == []
    assert found["directory"] == str(out)
    ran = billhook("eval", out, "--data", tiny.text_file(tmp_path / "t.txt"))
    assert ran.code == 2
    assert "Rename it: its packages open only paths that are UTF-8" in ran.err
