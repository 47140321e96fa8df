"""Perplexity after pruning with every allocator x criterion x sparsity, with default and with searched hyperparameters.

    python benchmarks/table.py                               the bundled model, on the standard library of Python
    python benchmarks/table.py --folder FOLDER --write docs/allocator_comparison.md

FOLDER holds `models/NAME` and `text/FILE` as named in `MODELS`; missing models are skipped. The calibration windows are
split as in `billhook search`: one half gives statistics, gradients and table (once for each model), the other the loss
by which hyperparameters are chosen; perplexity is measured on windows spread over another text. A searched
hyperparameter is the best of nine cheap trials, confirmed against uniform by full runs: where uniform wins, the cell is
uniform's. Trials with Wanda are used for SparseGPT too. Every cell is written to the journal (build/table.jsonl) when
it is finished: an interrupted run continues from there, and one with nothing left to do only writes the tables.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from billhook.racing.contest import UNIFORM, Budget, Contest
from billhook.racing.journal import Journal, Run
from billhook.racing.knobs import KNOBS, Candidate, Space

from billhook import allocate, evaluate, load_windows, measure
from billhook.engine.gradients import compute_gradients
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.plan import Plan
from billhook.steps.request import Request, open_request
from billhook.store.checkpoint import load_tokenizer
from billhook.trials.heldout import split_windows
from billhook.trials.trials import Bench, Setting

DEMO = Path(__file__).parents[1] / "billhook" / "demo_model"
STORIES = ("tinystories_train1000.jsonl", "tinystories_heldout.jsonl")
WIKI = ("c4_validation_2k.jsonl", "wikitext2_test_raw.txt")
MODELS = {  # name: calibration text, evaluation text, tokens a window
    "bundled": ("stdlib:train", "stdlib:heldout", 128),
    "stories260k": (*STORIES, 256),
    "babyllama-105": (*STORIES, 256),
    "c4gut-llama-12x128": (*WIKI, 128),
    "c4gut-llama-8x128": (*WIKI, 128),
}
NAMES = [
    "uniform",
    "alphapruning",
    "atp",
    "owl",
    "dlp",
    "er",
    "lamp",
    "global",
    "sensitivity",
]  # explicit has no sparsities of its own
COLUMNS = ["magnitude", "wanda", "gblm", "sparsegpt"]
ORDER = ["magnitude", "wanda", "sparsegpt", "gblm"]  # SparseGPT takes over the trials of Wanda
SPARSITIES = [0.5, 0.6, 0.7]
SAMPLES, WINDOWS, TRIALS, BATCH = 64, 128, 9, 16
BEGIN, END = "<!-- benchmarks/table.py: begin -->", "<!-- benchmarks/table.py: end -->"


@dataclass(frozen=True)
class Key:
    """One number: `knob` is default or searched."""

    model: str
    criterion: str
    sparsity: float
    allocator: str
    knob: str


class Cells:
    """The journal: a json object a line, read once and added to."""

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        self.found: dict[Key, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            if line.endswith("}"):  # the last line of a run that was killed may be cut off
                entry = json.loads(line)
                if entry["settings"] == settings:
                    self.found[Key(*(entry[name] for name in Key.__dataclass_fields__))] = entry

    def add(self, key: Key, **value: Any) -> None:
        """Note a number on disk, and tell of it."""
        entry = {**key.__dict__, "settings": self.settings, **value}
        self.found[key] = entry
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        options = ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in value["options"].items())
        where = f"{key.model} {key.criterion} {key.sparsity:g} {key.allocator} {key.knob}"
        print(f"{where}: {value['ppl']:.2f} ({value['allocator_found']} {options})", file=sys.stderr, flush=True)


class Subject:
    """A model with all that is computed once for it."""

    def __init__(self, name: str, folder: Path) -> None:
        calibration, evaluation, length = MODELS[name]
        self.name = name
        home = DEMO if name == "bundled" else folder / "models" / name
        place = (lambda text: text) if name == "bundled" else (lambda text: str(folder / "text" / text))
        request = Request(
            home, calibration=place(calibration), samples=SAMPLES, length=length, dtype="float32", batch_size=BATCH
        )
        self.opened = open_request(request, True, "The table")
        self.split = split_windows(self.opened, 0)
        windows = load_windows(place(evaluation), load_tokenizer(home), length=length).ids
        self.windows = windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS]
        self.blocks = len({layer.block for layer in self.opened.layers})

    @cached_property
    def table(self) -> Any:
        """What all allocators read, from the calibration half."""
        needs = [ALLOCATORS.needs(name, ALLOCATORS.configure(name, {})) for name in NAMES]
        columns = list(dict.fromkeys(column for names in needs for column in names))
        return measure(self.opened.model, columns, batches=self.split.batches, layers=self.opened.layers)

    def plan(self, candidate: Candidate, sparsity: float) -> Plan:
        """A candidate's plan."""
        return allocate(self.table, sparsity, allocator=candidate.allocator, **candidate.options)

    def ppl(self) -> float:
        """Token perplexity of the model as it is."""
        return evaluate(self.opened.model, self.windows, batch_size=BATCH).token_ppl

    def bench(self, criterion: str, folder: Path) -> Bench:
        """The bench of a criterion; gradients are computed here, once."""
        setting = Setting(criterion, CRITERIA.configure(criterion, {}))
        opened, gradients = self.opened, None
        if setting.gradient is not None:
            path = folder / "gradients.safetensors"
            gradients = compute_gradients(
                opened.model, self.split.batches, setting.gradient, path, layers=opened.layers
            )
        return Bench(opened.model, opened.layers, self.split.batches, self.split.heldout, setting, gradients=gradients)


def fill(subject: Subject, cells: Cells, criteria: list[str]) -> None:
    """Measure every number of a model that is missing."""
    trials: dict[tuple[float, str], list[Run]] = {}
    dense = Key(subject.name, "-", 0.0, "dense", "default")
    if dense not in cells.found:
        cells.add(dense, ppl=subject.ppl(), options={}, allocator_found="-")
    for criterion in criteria:
        todo = [key for key in keys(subject.name, criterion) if key not in cells.found]
        if not todo:
            continue
        _ = subject.table  # measured on the dense model
        with tempfile.TemporaryDirectory() as folder, subject.bench(criterion, Path(folder)) as bench:
            for sparsity in SPARSITIES:
                _fill(subject, cells, bench, [key for key in todo if key.sparsity == sparsity], trials)


def _fill(
    subject: Subject, cells: Cells, bench: Bench, todo: list[Key], trials: dict[tuple[float, str], list[Run]]
) -> None:
    """One criterion at one sparsity: the default knobs, then, from the uniform runs, the search for each allocator."""
    full: list[Run] = []
    for key in todo:
        candidate = Candidate(key.allocator, ALLOCATORS.configure(key.allocator, {}))
        if key.knob == "default":
            bench.prune(subject.plan(candidate, key.sparsity))
            cells.add(key, ppl=subject.ppl(), options=candidate.options, allocator_found=key.allocator)
            continue
        space = Space((key.allocator,), {}, subject.blocks, key.sparsity)
        known = trials.get((key.sparsity, key.allocator), []) if bench.setting.proxy[0] == "wanda" else []
        journal = Journal(None, {}, list(known), list(full))
        contest = Contest(space, bench, journal, "kl", lambda c, s=key.sparsity: subject.plan(c, s))  # type: ignore[misc]
        contest.try_(Budget(TRIALS))
        best = contest.confirm(1)
        full = journal.full[:1]
        if bench.setting.proxy[0] == "wanda":
            trials[key.sparsity, key.allocator] = journal.trials
        uniform = cells.found.get(Key(key.model, key.criterion, key.sparsity, "uniform", "default"))
        if best.candidate != UNIFORM or uniform is None:
            bench.prune(subject.plan(best.candidate, key.sparsity))
        ppl = uniform["ppl"] if best.candidate == UNIFORM and uniform else subject.ppl()
        options = best.candidate.options
        cells.add(
            key, ppl=ppl, options=options, allocator_found=best.candidate.allocator, trials=len(journal.trials) - 1
        )


def keys(model: str, criterion: str) -> Iterator[Key]:
    """All numbers of a model and criterion, uniform first."""
    for sparsity in SPARSITIES:
        yield from (Key(model, criterion, sparsity, name, "default") for name in NAMES)
        yield from (Key(model, criterion, sparsity, name, "searched") for name in NAMES if name in KNOBS)


def markdown(cells: Cells) -> str:
    """A table for each model that has numbers."""
    parts = []
    for model, (calibration, evaluation, length) in MODELS.items():
        dense = cells.found.get(Key(model, "-", 0.0, "dense", "default"))
        if dense is None:
            continue
        text = (
            f"**{model}**: dense {number(dense['ppl'])}; calibrated on {calibration}, scored on {evaluation}, "
            f"windows of {length}."
        )
        columns = [(criterion, sparsity) for criterion in COLUMNS for sparsity in SPARSITIES]
        parts += [text, "", "| allocator | " + " | ".join(f"{c} {s:.0%}" for c, s in columns) + " |"]
        parts += ["| --- |" + " --- |" * len(columns)]
        parts += [
            f"| {name} | " + " | ".join(cell(cells, model, c, s, name) for c, s in columns) + " |" for name in NAMES
        ]
        parts.append("")
    return "\n".join(parts)


def cell(cells: Cells, *place: Any) -> str:
    """Default knob / searched knob."""
    default, searched = (cells.found.get(Key(*place, knob)) for knob in ("default", "searched"))
    if default is None:
        return "…"
    if place[-1] not in KNOBS:
        return number(default["ppl"])
    if searched is None:
        return f"{number(default['ppl'])} / …"
    return f"{number(default['ppl'])} / {number(searched['ppl'])}" + (
        "°" if searched["allocator_found"] == "uniform" else ""
    )


def number(ppl: float) -> str:
    """A perplexity to three or four digits."""
    return f"{ppl:.2f}" if ppl < 10 else f"{ppl:.1f}" if ppl < 1000 else f"{ppl:.0f}" if ppl < 1e5 else f"{ppl:.0e}"


def write(path: Path, text: str) -> None:
    """Put the tables between the markers of a document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} has no markers {BEGIN} and {END}.")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    """Measure what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("shared"), help="where models/ and text/ are")
    parser.add_argument("--journal", type=Path, default=Path("build/table.jsonl"))
    parser.add_argument("--model", choices=list(MODELS), action="append", help="only these (default all)")
    parser.add_argument("--criterion", choices=COLUMNS, action="append", help="only these (default all)")
    parser.add_argument("--write", type=Path, help="a document with markers; the tables go between them")
    options = parser.parse_args()
    options.journal.parent.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.journal, f"{SAMPLES} windows, {WINDOWS} scored, {TRIALS} trials")
    for name in options.model or MODELS:
        if name != "bundled" and not (options.folder / "models" / name / "config.json").exists():
            print(f"{name} is not in {options.folder / 'models'}: skipped.", file=sys.stderr)
            continue
        with torch.no_grad():
            fill(Subject(name, options.folder), cells, options.criterion or ORDER)
    text = markdown(cells)
    if options.write:
        write(options.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
