"""The real llama.cpp, where the environment variable BILLHOOK_LLAMACPP names a folder with it (see CONTRIBUTING.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from billhook.store.gguf_file import GgufFile, read_gguf

# convert_hf_to_gguf.py refuses tokenizers that it does not recognize, such as those of tiny models
_CONVERT = """
import sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[1:]
import conversion.base
found = conversion.base.TextModel.get_vocab_base_pre
def recognize(self, tokenizer):
    try:
        return found(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
conversion.base.TextModel.get_vocab_base_pre = recognize
import runpy
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


class LlamaCpp:
    """Its converter and its driver."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        libraries = folder / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
        self.environment = os.environ | {"GGML_PATH": str(libraries), "PYTHONPATH": str(folder / "python")}

    def convert(self, model: Path, output: Path, kind: str = "auto") -> GgufFile:
        """The file that `convert_hf_to_gguf.py` makes of a model directory."""
        arguments = [str(self.folder / "llama.cpp"), str(model), "--outfile", str(output), "--outtype", kind]
        self._run([sys.executable, "-c", _CONVERT, *arguments])
        return read_gguf(output)

    def loss(self, file: Path, windows: np.ndarray) -> float:
        """Mean log loss of tokens 2 to n of windows int [windows, n]."""
        tokens = file.with_suffix(".tokens")
        windows.astype(np.int32).tofile(tokens)
        count, length = windows.shape
        return float(self._run([str(self.folder / "lc"), "loss", str(file), str(tokens), str(count), str(length), "1"]))

    def _run(self, command: list[str]) -> str:
        ran = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout


def differences(ours: GgufFile, theirs: GgufFile) -> dict[str, Any]:
    """Keys and tensors that differ between two files, without those of Billhook's own."""
    found: dict[str, Any] = {}
    for key in ours.metadata.keys() | theirs.metadata.keys():
        mine, other = ours.metadata.get(key), theirs.metadata.get(key)
        if mine != other and not key.startswith("billhook."):
            found[key] = (_short(mine), _short(other))
    for name in ours.tensors.keys() | theirs.tensors.keys():
        one, two = ours.tensors.get(name), theirs.tensors.get(name)
        if one is None or two is None or (one.type, one.shape) != (two.type, two.shape):
            found[name] = (one, two)
        elif not np.array_equal(ours.raw(one), theirs.raw(two)):
            found[name] = "other bytes"
    return found


def _short(value: Any) -> str:
    return json.dumps(str(value))[:200]


def llama_cpp() -> LlamaCpp:
    """The real llama.cpp; skips the test where there is none."""
    folder = os.environ.get("BILLHOOK_LLAMACPP")
    if not folder:
        pytest.skip("needs llama.cpp: BILLHOOK_LLAMACPP")
    return LlamaCpp(Path(folder))
