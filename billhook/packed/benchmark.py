"""Compare models on this machine: how fast they generate text, or read text or images, memory and file size.

Each model runs in its own process, so that its memory can be measured. A round runs every model once at every batch
size and prompt length, in turn, so that other load on the machine affects all models alike; the first round is a
warm-up. Speedups are ratios within a round. What is run is in `bench_worker`, what the models are given in
`bench_inputs`.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, JobError
from billhook.packed.bench_inputs import Run, runs_of
from billhook.packed.bench_worker import serve
from billhook.packed.format import open_packed
from billhook.store.layout import PACKED, is_packed
from billhook.store.shards import weight_files

Times = list[list[dict[str, float]]]  # for each run, and each round, the speeds by kind


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, with quartiles `low` and `high`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """Speed at one batch size and prompt length.

    * `batch`: prompts, texts or images at once.
    * `prompt`: tokens of each; null for images.
    * `prefill.*` (number): `median`, `low` and `high` (quartiles) of tokens of prompts or texts, or of images, read per
      second.
    * `decode.*` (number, optional): the same of tokens made per second, without the first of each prompt; null for
      models that generate nothing.
    * `prefill_speedup.*` (number, optional): the same of the ratio to the dense model in the same round; null without
      one.
    * `decode_speedup.*` (number, optional): the same.
    """

    batch: int
    prompt: int | None
    prefill: Spread
    decode: Spread | None = None
    prefill_speedup: Spread | None = None
    decode_speedup: Spread | None = None


@dataclass(frozen=True)
class Side:
    """One model of a benchmark.

    * `name`: name of its directory.
    * `packed`: whether it is packed.
    * `sparsity`: fraction removed of the weights of all packed tensors; null for a dense model.
    * `file_bytes`: size of the weight files and of billhook_packed.json.
    * `memory_bytes`: what loading and running added to the peak memory of its process.
    * `load_s`: seconds to load and check it and, the first time on a machine, to autotune.
    * `cells`: speeds (see `Speed`).
    """

    name: str
    packed: bool
    sparsity: float | None
    file_bytes: int
    memory_bytes: int
    load_s: float
    cells: list[Speed]


def bench(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] | None = None,
    new: int | None = None,
    rounds: int = 3,
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Side]:
    """Measure model directories in turn; the result for `against`, the dense one for speedups, comes first.

    `prompts` and `new` are as in `runs_of`, and `options` are passed to `billhook.load`. Raises BillhookError for
    invalid arguments and models, JobError when the process of a model dies.
    """
    if min([*batches, *(prompts or [1]), rounds]) < 1 or (new or 2) < 2 or not batches or prompts == []:
        raise BillhookError("Batch sizes, prompt lengths and rounds must be at least 1, and new tokens at least 2.")
    paths = [Path(path).expanduser() for path in ([] if against is None else [against]) + list(models)]
    if len(set(paths)) < len(paths):
        raise BillhookError("A model is given twice.")
    for path in paths:
        if not path.is_dir():
            raise BillhookError(f"There is no model directory at {path}.")
    options = options or {}
    runs = runs_of(paths, batches, prompts, new, trust_remote_code=options.get("trust_remote_code", False))
    with _workers(paths, options) as workers:
        facts = [_answer(worker) for worker in workers]
        times: list[Times] = [[[] for _ in runs] for _ in paths]
        for turn, number, side in product(range(rounds + 1), range(len(runs)), range(len(paths))):
            progress(f"{paths[side].name}, {runs[number]}, round {turn}/{rounds}")
            workers[side].send(runs[number])
            answer = _answer(workers[side])
            if turn:
                times[side][number].append(answer)
        for fact, worker in zip(facts, workers, strict=True):
            worker.send(None)
            fact |= _answer(worker)
    base = None if against is None else times[0]
    return [_side(*model, runs, base) for model in zip(paths, facts, times, strict=True)]


@contextmanager
def _workers(paths: Sequence[Path], options: dict[str, Any]) -> Iterator[list[Connection]]:
    """Connections to one process for each model; the processes end with the block."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for path in paths:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, path, options), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _answer(worker: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = worker.recv()
    except EOFError:
        raise JobError("The process of a model died, perhaps out of memory: measure fewer at once.") from None
    if "error" in answer:
        raise BillhookError(answer["error"])
    return answer


def _side(path: Path, facts: dict[str, Any], times: Times, runs: Sequence[Run], base: Times | None) -> Side:
    base = None if base is times else base
    cells = []
    for number, (run, speeds) in enumerate(zip(runs, times, strict=True)):
        found = {kind: _spread([speed[kind] for speed in speeds]) for kind in speeds[0]}
        if base is not None:
            pairs = list(zip(speeds, base[number], strict=True))
            ratios = {kind: _spread([speed[kind] / dense[kind] for speed, dense in pairs]) for kind in speeds[0]}
            found |= {f"{kind}_speedup": ratio for kind, ratio in ratios.items()}
        cells.append(Speed(run.batch, run.prompt, **found))
    return Side(
        path.name, packed=is_packed(path), sparsity=facts["sparsity"], file_bytes=file_bytes(path),
        memory_bytes=max(0, facts["peak_bytes"] - facts["idle_bytes"]), load_s=facts["load_s"], cells=cells,
    )  # fmt: skip


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def file_bytes(path: Path) -> int:
    """Bytes of a model's weight files, including the record of a packed model."""
    files = [*(s.file.path for s in open_packed(path).shards), path / PACKED] if is_packed(path) else weight_files(path)
    return sum(file.stat().st_size for file in files)


def hardware(device: str = "cpu") -> dict[str, Any]:
    """This machine: processor, kernels, threads, usable cores, memory in GiB, and the GPU of `device`."""
    import torch

    from billhook.runtime import library

    about = library.about()
    found = {"processor": about["cpu"], "kernels": about["path"], "threads": about["threads"]}
    found["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if device.startswith("cuda") and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(device)
    return found
