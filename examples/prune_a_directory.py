"""Prune a model directory and get a model directory back: the main job, in Python.

MODEL may be any model directory; calibrate with text similar to its training text. Here it is the small bundled model,
which was trained on the sources of Python's standard library.
"""

import tempfile
from pathlib import Path

import billhook

MODEL = Path(billhook.__file__).parent / "demo_model"


def main() -> None:
    """Prune, verify what was written, and open it like any other model."""
    output = Path(tempfile.mkdtemp()) / "pruned"
    report = billhook.prune(
        MODEL,
        sparsity=0.5,
        criterion="wanda",
        allocator="atp",
        options={"beta": 0.02},
        calibration="stdlib:train",
        samples=16,
        length=128,
        output=output,
    )
    print(f"{report.sparsity:.2%} of the weights are zero now, after {report.seconds:.1f} s.")
    checked = billhook.verify(output)
    print(f"On disk: {checked.zeros:,} zeros, {'as recorded' if checked.ok else checked.problems}.")

    from transformers import AutoModelForCausalLM

    print(type(AutoModelForCausalLM.from_pretrained(output)).__name__, "opened with stock transformers.")


if __name__ == "__main__":
    main()
