"""Compare how models generate on this machine: prefill and decode speed, memory and file size.

Each model runs in its own process, so that its memory can be measured. A round runs every model once at every batch
size and prompt length, in turn, so that other load on the machine affects all models alike; the first round is a
warm-up. Speedups are ratios within a round. The generation loop is that of `transformers`, with random tokens.
"""

import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from billhook.architectures.config import context_length, positions_needed
from billhook.errors import BillhookError, JobError
from billhook.packed.format import open_packed
from billhook.store.checkpoint import class_names, loading
from billhook.store.layout import PACKED, is_packed
from billhook.store.shards import weight_files

KINDS = ("prefill", "decode")
PROMPTS = (16, 128, 512)
GENERATING = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
Times = list[list[dict[str, float]]]  # for each cell, and each round, the speeds by kind


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, with quartiles `low` and `high`."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """Speed at one batch size and prompt length.

    * `batch`: prompts at once.
    * `prompt`: tokens of each.
    * `prefill.*` (number): `median`, `low` and `high` (quartiles) of prompt tokens read per second.
    * `decode.*` (number): the same of tokens made per second, without the first of each prompt.
    * `prefill_speedup.*` (number, optional): the same of the ratio to the dense model in the same round; null without
      one.
    * `decode_speedup.*` (number, optional): the same.
    """

    batch: int
    prompt: int
    prefill: Spread
    decode: Spread
    prefill_speedup: Spread | None
    decode_speedup: Spread | None


@dataclass(frozen=True)
class Side:
    """One model of a benchmark.

    * `name`: name of its directory.
    * `packed`: whether it is packed.
    * `sparsity`: fraction removed of the weights of all packed tensors; null for a dense model.
    * `file_bytes`: size of the weight files and of billhook_packed.json.
    * `memory_bytes`: what loading and running added to the peak memory of its process.
    * `load_s`: seconds to load and check it and, the first time on a machine, to autotune.
    * `cells`: speeds (see `Cell`).
    """

    name: str
    packed: bool
    sparsity: float | None
    file_bytes: int
    memory_bytes: int
    load_s: float
    cells: list[Cell]


def bench(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] | None = None,
    new: int = 64,
    rounds: int = 3,
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Side]:
    """Measure model directories in turn; the result for `against`, the dense one for speedups, comes first.

    `prompts` are those of `PROMPTS` that the models' contexts have room for. `options` are passed to `billhook.load`.
    Raises BillhookError for invalid arguments and models, JobError when the
    process of a model dies.
    """
    if min([*batches, *(prompts or [1]), rounds]) < 1 or new < 2 or not batches or prompts == []:
        raise BillhookError("Batch sizes, prompt lengths and rounds must be at least 1, and new tokens at least 2.")
    paths = [Path(path).expanduser() for path in ([] if against is None else [against]) + list(models)]
    if len(set(paths)) < len(paths):
        raise BillhookError("A model is given twice.")
    for path in paths:
        if not path.is_dir():
            raise BillhookError(f"There is no model directory at {path}.")
    prompts = [*_fitting(paths, prompts, new)]
    cells = [{"batch": batch, "prompt": prompt, "new": new} for batch in batches for prompt in prompts]
    with _workers(paths, options or {}) as workers:
        facts = [_answer(worker) for worker in workers]
        times: list[Times] = [[[] for _ in cells] for _ in paths]
        for turn, number, side in product(range(rounds + 1), range(len(cells)), range(len(paths))):
            batch, prompt = cells[number]["batch"], cells[number]["prompt"]
            progress(f"{paths[side].name}, batch {batch}, prompt {prompt}, round {turn}/{rounds}")
            workers[side].send(cells[number])
            answer = _answer(workers[side])
            if turn:
                times[side][number].append(answer)
        for fact, worker in zip(facts, workers, strict=True):
            worker.send(None)
            fact |= _answer(worker)
    base = None if against is None else times[0]
    return [_side(*model, cells, base) for model in zip(paths, facts, times, strict=True)]


def _fitting(paths: Sequence[Path], prompts: Sequence[int] | None, new: int) -> Iterator[int]:
    """The prompts for which every model has room, with the `new` tokens after them, in order.

    Raises BillhookError, before a model is loaded, where one that was given is too long, or none is left.
    """
    from transformers import AutoConfig  # takes seconds

    configs = dict[str, Any]()
    for path in paths:
        with loading(path):
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if not any(config.model_type in class_names(kind) for kind in GENERATING):
            raise BillhookError(
                f"{path} is {config.model_type}, which generates no tokens: bench is for those that do."
            )
        configs[path.name] = config
    for prompt in PROMPTS if prompts is None else prompts:
        needed = {name: positions_needed(config, prompt, new) for name, config in configs.items()}
        short = {n: c for n, config in configs.items() if (c := context_length(config)) and needed[n] > c}
        name, context = min(short.items(), key=lambda pair: pair[1], default=("", None))
        if context is None:
            yield prompt
        elif prompts is not None or prompt == min(PROMPTS):
            room = f"{name} reads at most {context} tokens, and a prompt of {prompt} with {new} new ones is longer"
            raise BillhookError(f"{room}: give smaller --prompt or --new.")


@contextmanager
def _workers(paths: Sequence[Path], options: dict[str, Any]) -> Iterator[list[Connection]]:
    """Connections to one process for each model; the processes end with the block."""
    context = multiprocessing.get_context("spawn")
    connections, processes = [], []
    try:
        for path in paths:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, path, options), daemon=True)
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


def _serve(connection: Connection, path: Path, options: Mapping[str, Any]) -> None:
    """In a worker: load the model, then answer {batch, prompt, new} with speeds, or an error, until None arrives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent, which ends this process
    try:
        facts = _load(path, options)
        model = facts.pop("model")
        connection.send(facts)
        while (cell := connection.recv()) is not None:
            connection.send(_run(model, **cell))
        connection.send({"peak_bytes": peak_memory()})
    except (EOFError, BrokenPipeError):
        return  # the parent process has ended
    except BillhookError as error:
        connection.send({"error": str(error)})
    except (MemoryError, RuntimeError) as error:
        connection.send({"error": f"{path}: {type(error).__name__}: {error}"})


def _load(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    from billhook.packed.loading import load
    from billhook.store.checkpoint import load_tokenizer  # noqa: F401 - its imports count as idle memory

    idle = peak_memory()
    start = time.perf_counter()
    model = load(path, **options)
    seconds = time.perf_counter() - start
    sparsity = open_packed(path).sparsity if is_packed(path) else None
    return {"model": model, "load_s": seconds, "idle_bytes": idle, "sparsity": sparsity}


def _run(model: Any, batch: int, prompt: int, new: int) -> dict[str, float | None]:
    """Tokens per second for a batch of random prompts, the same each time."""
    import torch

    from billhook.architectures.config import vocabulary_size
    from billhook.packed.generation import generate

    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_size(model), (batch, prompt), generator=random)
    made = generate(model, ids, new, stop=False)
    return {"prefill": made.prefill_tokens_per_s, "decode": made.tokens_per_s}


def peak_memory() -> int:
    """The peak resident memory of this process in bytes, including pages of mapped files."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _side(path: Path, facts: dict[str, Any], times: Times, cells: list[dict[str, int]], base: Times | None) -> Side:
    found = []
    for number, cell in enumerate(cells):
        runs = times[number]
        prefill, decode = (_spread([run[kind] for run in runs]) for kind in KINDS)
        ratios: list[Spread | None] = [None, None]
        if base is not None and base is not times:
            pairs = list(zip(runs, base[number], strict=True))
            ratios = [_spread([run[kind] / dense[kind] for run, dense in pairs]) for kind in KINDS]
        batch, prompt = cell["batch"], cell["prompt"]
        found.append(Cell(batch, prompt, prefill, decode, prefill_speedup=ratios[0], decode_speedup=ratios[1]))
    return Side(
        path.name, packed=is_packed(path), sparsity=facts["sparsity"], file_bytes=file_bytes(path),
        memory_bytes=max(0, facts["peak_bytes"] - facts["idle_bytes"]), load_s=facts["load_s"], cells=found,
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
