"""Code in a new interpreter, to see what it loads."""

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "numpy", "safetensors", "datasets", "tokenizers", "huggingface_hub"}
_REPORT = """
import json, sys
def report(code):
    loaded = sorted({name.partition(".")[0] for name in sys.modules})
    print("REPORT", json.dumps({"loaded": loaded, "code": code, "modules": len(sys.modules)}))
"""


def in_new_interpreter(code: str, *arguments: str) -> dict:
    """Run `code` elsewhere: the packages and the number of modules it loaded, its exit code and output."""
    ran = subprocess.run(
        [sys.executable, "-c", _REPORT + code, *arguments], capture_output=True, text=True, timeout=240
    )
    text, found, report = ran.stdout.rpartition("REPORT ")
    assert found, ran.stderr
    return json.loads(report) | {"text": text, "errors": ran.stderr}
