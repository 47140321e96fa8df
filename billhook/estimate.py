"""What a job will cost, before it starts: seconds, memory and disk, from the sizes involved and a tenth of a second of measuring.

The times are those of matrix products at the rate measured here; they are good to about a factor of two.
"""

import resource
import sys
import time
from pathlib import Path

import torch

from billhook.criteria import CRITERIA
from billhook.job import Job
from billhook.stats import GRADIENTS, STATISTICS
from billhook.streaming import stream_of

_FLOPS_OF_CUBE = 2.0  # Cholesky, triangular inverse and the column updates of SparseGPT, in units of in^2 (in + out)
PROCESS = 0.4 * 2**30  # Python and the libraries
_PASSES = 4  # over the files: digest of the source, check for NaN, checksums of the output and counting its zeros
_BYTE_RATE = 5e8  # bytes a second
_SELECTION_RATE = 2e7  # weights selected a second and core; a partial sort, whatever the criterion


def estimate(job: Job) -> dict[str, float]:
    """Return `seconds` for pruning, peak `memory_gib` and `disk_gib`."""
    opened = job.opened
    parameters = sum(p.numel() * p.element_size() for p in opened.model.parameters())
    weights = sum(out * columns for out, columns in (layer.shape for layer in opened.layers))
    tokens = sum(batch.numel() for batch in opened.batches)
    needs = CRITERIA.needs(job.request.criterion, job.criterion_options)
    flops = 2 * 2.0 * weights * tokens if any(name in STATISTICS for name in needs) else 0.0
    largest = max(out * columns for out, columns in (layer.shape for layer in opened.layers))
    blocks = 1 + max(layer.block for layer in opened.layers)
    stream = stream_of(opened.model)
    held = sum(p.numel() * p.element_size() for p in opened.model.parameters() if stream is None or not p.is_meta)
    held += 0 if stream is None else (parameters - held) // len(stream.blocks)
    hidden = min(2 * tokens * _width(job) * opened.model.dtype.itemsize, 2 * job.request.spill_gib * 2**30)
    memory = PROCESS + held + 5 * 4 * largest + hidden
    if job.gradients is None and any(name in GRADIENTS for name in needs):
        flops += 4 * 2.0 * weights * tokens  # two forward passes, and a backward pass that costs as much as both
        stored = min(blocks * tokens * _width(job) * opened.model.dtype.itemsize, job.request.spill_gib * 2**30)
        memory += stored + (4 + opened.model.dtype.itemsize) * weights / blocks
    if "gram" in needs:
        inputs = [layer.shape[1] for layer in opened.layers]
        flops += sum(2.0 * tokens * n**2 + _FLOPS_OF_CUBE * n**2 * sum(layer.shape) for n, layer in zip(inputs, opened.layers, strict=True))
        memory += 4 * sum(n**2 for n in inputs) / blocks + 3 * 4 * max(inputs) ** 2
    seconds = flops / _rate(opened.model.dtype) + weights / _SELECTION_RATE / torch.get_num_threads()
    seconds += parameters * _PASSES / _BYTE_RATE
    return {"seconds": round(seconds, 1), "memory_gib": round(memory / 2**30, 3), "disk_gib": round(parameters / 2**30, 3)}


def _width(job: Job) -> int:
    return int(job.opened.model.config.get_text_config(decoder=True).hidden_size)


def _rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of ordinary size on the CPU."""
    a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    a @ b
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * 512 * 1024 * 1024 / (time.perf_counter() - start)


def available_gib() -> float | None:
    """Memory that the system could still give, in GiB; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")), None)


def peak_gib() -> float:
    """The most memory that this process has had so far, in GiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)
