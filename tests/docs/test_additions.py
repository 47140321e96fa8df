"""What docs/add_a_method.md adds needs one new file and one other, and works in every command then."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documentation import GUIDE, blocks
from paths import ROOT, TESTS

TABLE = re.findall(r"^\| an? ([\w ]+) \| `(\S+)NAME\.py` \|[^|]*`(billhook/\S+)` \|$", GUIDE.read_text("utf-8"), re.M)
NAMES = {
    "allocator": "depth",
    "criterion": "squares",
    "quantizer": "shrink",
    "task": "last_token",
    "sink": "one_file",
    "command": "count",
}
LINES = {  # what is found in the other file, and put before it
    "allocator": [('"uniform": ', '"depth": "billhook.plan.allocators.depth:depth", ')],
    "criterion": [('"magnitude": ', '"squares": "billhook.methods.sparse.squares:squares", ')],
    "quantizer": [('"round": ', '"shrink": "billhook.methods.quantize.shrink:shrink", ')],
    "task": [('"fill-mask": ', '"last-token": "billhook.tasks.last_token:TASK", ')],
    "sink": [
        (
            "return StockLayout(model, []), None",
            "from billhook.store.one_file import OneFile; return OneFile(model), None\n        ",
        )
    ],
    "command": [("    demo,\n", "    count,\n"), ("demo, plot", "count, ")],
}
USE = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny
from command import TEXT, done
import billhook
from billhook.methods.sparse import CRITERIA
from billhook.store.gguf_file import read_gguf
from billhook.tasks import TASKS

tiny.text_file(Path("text.txt"), 30)
model = tiny.llama()
tiny.save(Path("model"), model)
done("prune", "model", "--sparsity", "0.5", "--allocator", "depth", "--criterion", "squares", *TEXT, "-o", "pruned")
done("quantize", "model", "--type", "q8_0", "--quantizer", "shrink", "--set", "factor=0", "-o", "small")
file = read_gguf(Path("small/small.gguf"))
assert not any(file.values(entry).any() for name, entry in file.tensors.items() if "attn_q.weight" in name)
assert TASKS.get("last-token").protocol.startswith("perplexity of the last token")
billhook.prune(model, sparsity=0.5, criterion="magnitude", output="whole")
assert "model.safetensors" in os.listdir("whole")
weights = sum(layer.shape[0] * layer.shape[1] for layer in billhook.find_layers(model))
assert done("count", "model").out.split() == [str(weights)]
for kind in ("allocators", "criteria", "quantizers"):
    done("ls", kind)
"""


def test_the_table_names_the_files_of_every_kind() -> None:
    assert {kind for kind, _, _ in TABLE} >= NAMES.keys()
    for _, folder, other in TABLE:
        assert (ROOT / folder).is_dir()
        assert (ROOT / other).is_file()


@pytest.mark.nightly
def test_every_kind_is_added_by_one_new_file_and_a_line_in_another(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "billhook", tmp_path / "billhook", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, folder, other in TABLE:
        if kind in NAMES:
            (code,) = blocks(GUIDE, f"run: {kind}")
            new, old = tmp_path / folder / f"{NAMES[kind]}.py", tmp_path / other
            assert not new.exists()
            new.write_text(code + "\n", encoding="utf-8")
            text = old.read_text(encoding="utf-8")
            for found, line in LINES[kind]:
                assert text.count(found) == 1, (kind, found)
                text = text.replace(found, line + found)
            old.write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USE, str(TESTS)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
