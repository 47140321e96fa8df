"""The real llama.cpp, where the environment variable BILLHOOK_LLAMACPP names a folder with it (see CONTRIBUTING.md)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import TESTS

from billhook.store.gguf_file import GgufFile, read_gguf

# convert_hf_to_gguf.py refuses tokenizers that it does not recognize, such as that of the demonstration model
_CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[1:]
from conversion.base import TextModel
known = TextModel.get_vocab_base_pre
def recognize(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return "gpt-2"
TextModel.get_vocab_base_pre = recognize
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""
_TRAIN = """
import sys
import sentencepiece
sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[1], model_prefix=sys.argv[2], vocab_size=700, model_type="bpe", byte_fallback=True,
    user_defined_symbols=["<own>"], unk_id=0, bos_id=1, eos_id=2, split_digits=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
)
"""


class LlamaCpp:
    """Its converter, its libraries, and the sentencepiece package."""

    def __init__(self, folder: Path, build: Path) -> None:
        self.folder, self.driver = folder, build / "driver"
        self.libraries = folder / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
        self.environment = os.environ | {"PYTHONPATH": str(folder / "python")}
        headers = [f"-I{folder / 'llama.cpp' / part / 'include'}" for part in (".", "ggml")]
        linked = [
            str(x) for x in self.libraries.iterdir() if x.name.startswith(("libllama.", "libggml.", "libggml-base"))
        ]
        source = str(TESTS / "export" / "llama_driver.cpp")
        self._run(
            [
                "g++",
                "-O1",
                "-std=c++17",
                *headers,
                source,
                "-o",
                str(self.driver),
                *linked,
                f"-Wl,-rpath,{self.libraries}",
            ]
        )

    def convert(self, model: Path, output: Path, kind: str = "auto") -> GgufFile:
        """The file that `convert_hf_to_gguf.py` makes of a model directory."""
        arguments = [str(self.folder / "llama.cpp"), str(model), "--outfile", str(output), "--outtype", kind]
        self._run([sys.executable, "-c", _CONVERT, *arguments])
        return read_gguf(output)

    def quantize(self, file: Path, output: Path, types: Path, kind: str) -> GgufFile:
        """The file that `llama-quantize` makes with a file of types; skips the test where it is not built."""
        program = self.folder / "llama.cpp" / "build" / "bin" / "llama-quantize"
        if not program.is_file():
            pytest.skip(f"needs {program.name}")
        self._run([str(program), "--tensor-type-file", str(types), str(file), str(output), kind, "1"])
        return read_gguf(output)

    def loss(self, file: Path, windows: np.ndarray) -> float:
        """Mean log loss of tokens 2 to n of windows int [windows, n]."""
        count, length = windows.shape
        command = [str(self.driver), "loss", str(file), str(self.libraries), str(count), str(length)]
        return float(self._run(command, windows.astype(np.int32).tobytes()))

    def tokens(self, file: Path, texts: list[str]) -> list[list[int]]:
        """The token numbers of texts."""
        command = [str(self.driver), "tokens", str(file), str(self.libraries)]
        lines = self._run(command, b"\0".join(text.encode() for text in texts)).splitlines()
        return [[int(number) for number in line.split()] for line in lines]

    def train_sentencepiece(self, text: Path, prefix: Path) -> None:
        """Write a tokenizer PREFIX.model of 700 pieces."""
        self._run([sys.executable, "-c", _TRAIN, str(text), str(prefix)])

    def _run(self, command: list[str], given: bytes | None = None) -> str:
        ran = subprocess.run(command, input=given, capture_output=True, env=self.environment, check=False)
        assert ran.returncode == 0, ran.stderr.decode()[-3000:]
        return ran.stdout.decode()


def differences(ours: GgufFile, theirs: GgufFile) -> dict[str, Any]:
    """Keys and tensors that differ between two files, without Billhook's own keys."""
    found: dict[str, Any] = {}
    for key in ours.metadata.keys() | theirs.metadata.keys():
        mine, other = ours.metadata.get(key), theirs.metadata.get(key)
        if mine != other and not key.startswith("billhook."):
            found[key] = (str(mine)[:200], str(other)[:200])
    for name in ours.tensors.keys() | theirs.tensors.keys():
        one, two = ours.tensors.get(name), theirs.tensors.get(name)
        if one is None or two is None or (one.type, one.shape) != (two.type, two.shape):
            found[name] = (one, two)
        elif not np.array_equal(ours.raw(one), theirs.raw(two)):
            found[name] = "other bytes"
    return found


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory) -> LlamaCpp:
    """The real llama.cpp; skips the test where there is none."""
    folder = os.environ.get("BILLHOOK_LLAMACPP")
    if not folder:
        pytest.skip("needs llama.cpp: BILLHOOK_LLAMACPP")
    return LlamaCpp(Path(folder), tmp_path_factory.mktemp("llamacpp"))
