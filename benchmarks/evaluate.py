"""Token perplexity against lm-evaluation-harness's rolling log-likelihood, on the same windows: the ratio of times, and
both numbers.

    python benchmarks/evaluate.py [MODEL SOURCE [threads]]     by default the bundled model, on text it has not seen

Each window goes through the harness as its rolling log-likelihood does it: the first token is given, the others are
scored. Loading is not counted; both are run three times in turn and the best time counts. Needs pip install
'billhook[eval]'.
"""

import contextlib
import io
import math
import os
import sys
import time
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from billhook.demo import MODEL
from billhook.evaluation.perplexity import evaluate
from billhook.store.checkpoint import load_tokenizer
from billhook.tasks.opening import load_model
from billhook.text.windows import load_windows

REPEATS, LENGTH, WINDOWS = 3, 256, 64
os.environ["TQDM_DISABLE"] = "1"


def main(directory: str = str(MODEL), source: str = "stdlib:heldout", threads: str = "2") -> None:
    """Print a line for each batch size of the harness, and one for Billhook."""
    torch.set_num_threads(int(threads))
    model, tokenizer = load_model(Path(directory), dtype="float32"), load_tokenizer(Path(directory))
    windows = load_windows(source, tokenizer, length=LENGTH, limit=WINDOWS)
    count, length = windows.ids.shape
    requests = []
    for row in windows.ids.tolist():
        (window,) = map(make_disjoint_window, get_rolling_token_windows(row[1:], row[0], length - 1, 1))
        requests.append((None, *window))
    scored = count * (length - 1)
    best: dict[str, tuple[float, float]] = {}

    def note(name: str, seconds: float, nll: float) -> None:
        best[name] = min(best.get(name, (math.inf, 0.0)), (seconds, nll))

    for _ in range(REPEATS):
        start = time.perf_counter()
        nll = evaluate(model, windows).nll
        note("billhook", time.perf_counter() - start, nll)
        for size in (1, 4, 16):
            with contextlib.redirect_stderr(io.StringIO()):
                harness = HFLM(
                    pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=size, softmax_dtype="float32"
                )
                start = time.perf_counter()
                found = harness._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=size)
            note(f"lm-eval, batch {size}", time.perf_counter() - start, -sum(value for value, _ in found) / scored)
    ours, nll = best["billhook"]
    print(f"{Path(directory).name}: {count} windows of {length} tokens, {threads} threads, {model.dtype}")
    for name, (seconds, value) in best.items():
        same = abs(value - nll) < 1e-5
        print(
            f"{name:18} {seconds:8.2f} s  token perplexity {math.exp(value):.5f}  time / ours "
            f"{seconds / ours:.2f}  same number: {same}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
