"""One side of a benchmark: a process of its own that holds one model and runs what it is told, so that its memory can
be counted."""

import resource
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def serve(connection: Connection, path: str, options: Mapping[str, Any]) -> None:
    """Load the model at `path`, then answer {batch, prompt, new} with seconds until None comes; a failure is answered
    in words."""
    from billhook.errors import BillhookError

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which ends this one
    try:
        answer = _load(Path(path), options)
        model = answer.pop("model")
        connection.send(answer)
        while (cell := connection.recv()) is not None:
            connection.send(_run(model, **cell))
        connection.send({"peak_bytes": peak_memory()})
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more
    except BillhookError as error:
        connection.send({"error": str(error)})
    except (MemoryError, RuntimeError) as error:
        connection.send({"error": f"{path}: {type(error).__name__}: {error}"})


def _load(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    from billhook.packed.format import open_packed
    from billhook.packed.loading import load
    from billhook.store.checkpoint import load_tokenizer  # noqa: F401 - so that its imports count as idle memory
    from billhook.store.layout import is_packed

    idle = peak_memory()
    start = time.perf_counter()
    model = load(path, **options)
    seconds = time.perf_counter() - start
    sparsity = open_packed(path).sparsity if is_packed(path) else None
    return {"model": model, "load_s": seconds, "idle_bytes": idle, "sparsity": sparsity}


def _run(model: Any, batch: int, prompt: int, new: int) -> dict[str, float | None]:
    """Seconds for a batch of random prompts, the same each time."""
    import torch

    from billhook.evaluation.perplexity import vocabulary_size
    from billhook.packed.generation import generate

    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_size(model), (batch, prompt), generator=random)
    made = generate(model, ids, new, stop=False)
    return {"prefill": made.prefill_tokens_per_s, "decode": made.tokens_per_s}


def peak_memory() -> int:
    """The most memory this process ever had, in bytes, mapped files included as far as they were read."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
