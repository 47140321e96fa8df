"""How fast models generate here, side by side: prompts read, tokens made, memory and file size.

Each model lives in a process of its own. A round runs every model once at every batch size and prompt length, one after
the other, so that what else happens on the machine meets all of them alike; the first round warms up and is not
counted. Speed-ups are ratios within a round. It is the generation loop of `transformers` that is timed, as users run
it, with random tokens.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, JobError
from billhook.packed.format import open_packed
from billhook.packed.worker import serve
from billhook.reports.charts import Axis, Series, chart
from billhook.store.layout import PACKED, is_packed
from billhook.store.shards import weight_files

KINDS = ("prefill", "decode")


@dataclass(frozen=True)
class Spread:
    """The median of some measurements, and their quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """Tokens a second at one batch size and prompt length, and how many times the dense model's; None without one."""

    batch: int
    prompt: int
    prefill: Spread
    decode: Spread
    prefill_speedup: Spread | None
    decode_speedup: Spread | None


@dataclass(frozen=True)
class Side:
    """One model: `memory_bytes` is what it added to its process at the peak, `sparsity` is of its packed tensors, None
    if dense."""

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
    prompts: Sequence[int] = (16, 128, 512),
    new: int = 64,
    rounds: int = 3,
    options: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Side]:
    """Measure model directories side by side; `against` (the dense one) comes first, and the speed of the others is
    compared with its.

    `options` go to `billhook.load`. Raises BillhookError for what cannot be measured as asked, JobError when a model's
    process dies.
    """
    if min([*batches, *prompts, rounds]) < 1 or new < 2 or not (batches and prompts):
        raise BillhookError(
            "Batch sizes, prompt lengths and rounds start at 1, new tokens at 2: the first belongs to the prompt."
        )
    paths = [Path(path).expanduser() for path in ([] if against is None else [against]) + list(models)]
    if len(set(paths)) < len(paths):
        raise BillhookError("A model is given twice: each is measured once.")
    for path in paths:
        if not path.is_dir():
            raise BillhookError(f"There is no model directory at {path}.")
    cells = [{"batch": batch, "prompt": prompt, "new": new} for batch in batches for prompt in prompts]
    with _workers(paths, options or {}) as workers:
        facts = [_answer(worker) for worker in workers]
        seen: list[list[list[dict[str, float]]]] = [[[] for _ in cells] for _ in paths]
        for turn in range(rounds + 1):
            for number, cell in enumerate(cells):
                for path, worker, found in zip(paths, workers, seen, strict=True):
                    progress(f"{path.name}, batch {cell['batch']}, prompt {cell['prompt']}, round {turn}/{rounds}")
                    worker.send(cell)
                    answer = _answer(worker)
                    if turn:
                        found[number].append(answer)
        for fact, worker in zip(facts, workers, strict=True):
            worker.send(None)
            fact |= _answer(worker)
    base = None if against is None else seen[0]
    return [_side(*of, cells, base) for of in zip(paths, facts, seen, strict=True)]


@contextmanager
def _workers(paths: Sequence[Path], options: dict[str, Any]) -> Iterator[list[Connection]]:
    """A process for each model, and the line to it; all are gone at the end."""
    context = multiprocessing.get_context("spawn")
    lines, processes = [], []
    try:
        for path in paths:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, str(path), options), daemon=True)
            process.start()
            theirs.close()
            lines.append(ours)
            processes.append(process)
        yield lines
    finally:
        for line in lines:
            line.close()
        for process in processes:
            process.terminate()
            process.join()


def _answer(worker: Connection) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = worker.recv()
    except EOFError:
        raise JobError(
            "The process of a model died: most likely it ran out of memory. Measure fewer or smaller models at once."
        ) from None
    if "error" in answer:
        raise BillhookError(answer["error"])
    return answer


def _side(
    path: Path,
    facts: dict[str, Any],
    seen: list[list[dict[str, float]]],
    cells: list[dict[str, int]],
    base: list[list[dict[str, float]]] | None,
) -> Side:
    found = []
    for number, cell in enumerate(cells):
        runs = {kind: [run[kind] for run in seen[number]] for kind in KINDS}
        ratios: dict[str, Spread | None] = dict.fromkeys(KINDS)
        if base is not None and base is not seen:
            ratios = {
                kind: _spread([a / b[kind] for a, b in zip(runs[kind], base[number], strict=True)]) for kind in KINDS
            }
        speeds = [_spread(runs[kind]) for kind in KINDS]
        found.append(Cell(cell["batch"], cell["prompt"], *speeds, *ratios.values()))
    memory = max(0, facts["peak_bytes"] - facts["idle_bytes"])
    return Side(path.name, is_packed(path), facts["sparsity"], file_bytes(path), memory, facts["load_s"], found)


def _spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def file_bytes(path: Path) -> int:
    """Bytes of a model's weights on disk, and of the record that a packed one needs."""
    files = [*(s.file.path for s in open_packed(path).shards), path / PACKED] if is_packed(path) else weight_files(path)
    return sum(file.stat().st_size for file in files)


def picture(sides: Sequence[Side], kind: str = "decode") -> str | None:
    """Speed-up against sparsity as SVG, a line for each batch size and prompt length; None where fewer than two models
    have both."""
    packed = sorted((side for side in sides if side.sparsity is not None), key=lambda side: side.sparsity or 0.0)
    series = []
    for number, cell in enumerate(packed[0].cells if packed else []):
        found = [(100 * (s.sparsity or 0.0), getattr(s.cells[number], f"{kind}_speedup")) for s in packed]
        points = [(x, ratio) for x, ratio in found if ratio is not None]
        bands = ([r.median for _, r in points], [r.low for _, r in points], [r.high for _, r in points])
        labels = [f"{x:.1f} % removed: {r.median:.2f}x" for x, r in points]
        series.append(
            Series(f"batch {cell.batch}, prompt {cell.prompt}", [x for x, _ in points], *bands, labels=labels)
        )
    if not series or len(series[0].x) < 2:
        return None
    dense = Series("dense", [series[0].x[0], series[0].x[-1]], [1.0, 1.0], marks=False, dashed=True)
    x, y = Axis("weights removed from packed layers (%)"), Axis("times as fast as the dense model", zero=True)
    title = {"decode": "Tokens made a second", "prefill": "Tokens of the prompt read a second"}[kind]
    return chart(
        f"{title}, packed against dense",
        [*series, dense],
        x,
        y,
        summary="Bands: quartiles over the rounds.",
        standalone=True,
    )
