"""search.json: what a search did so far, rewritten whole after every run, so that it can go on after any interruption.

File format: docs/formats.md, `search.json`. The same inputs and seed give the same bytes, so there is no date and no
duration in it.
"""

import math
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import billhook
from billhook.errors import BillhookError
from billhook.plan.plan import Plan
from billhook.racing.knobs import Candidate
from billhook.store.files import read_json, write_json

VERSION = 1
RECORD, PLAN, PICTURE, MODEL = "search.json", "plan.json", "search.svg", "model"


@dataclass(frozen=True)
class Run:
    """One candidate's losses per held-out window, in nats a token; `stopped` when it was given up before all windows of
    a trial."""

    candidate: Candidate
    kl: list[float]
    nll: list[float]
    stopped: bool

    def loss(self, objective: str) -> float:
        """The mean over windows."""
        return statistics.fmean(self.kl if objective == "kl" else self.nll)

    def to_json(self) -> dict[str, Any]:
        """The entry in search.json."""
        c = self.candidate
        entry: dict[str, Any] = {
            "allocator": c.allocator,
            "options": c.options,
            "tick": c.tick,
            "windows": len(self.kl),
        }
        entry |= {"stopped": self.stopped, "mean_kl": self.loss("kl"), "mean_nll": self.loss("nll")}
        return entry | {"kl": self.kl, "nll": self.nll}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "Run":
        """The inverse; raises KeyError or TypeError for an entry that is none."""
        candidate = Candidate(entry["allocator"], dict(entry["options"]), entry["tick"])
        return cls(candidate, [float(x) for x in entry["kl"]], [float(x) for x in entry["nll"]], bool(entry["stopped"]))


def loss_difference(run: Run, other: Run, objective: str) -> tuple[float, float]:
    """Mean and standard error of `run` minus `other` over the windows that both have."""
    a, b = (r.kl if objective == "kl" else r.nll for r in (run, other))
    paired = [x - y for x, y in zip(a, b, strict=False)]
    spread = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else math.inf
    return statistics.fmean(paired), spread


@dataclass
class Journal:
    """The runs of a search. `folder` is None for one that leaves no files."""

    folder: Path | None
    identity: dict[str, Any]
    trials: list[Run] = field(default_factory=list)
    full: list[Run] = field(default_factory=list)
    best: dict[str, Any] | None = None

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, Any], overwrite: bool) -> "Journal":
        """Start a journal in `folder`, made if need be, or go on with the one there.

        Raises BillhookError, unless `overwrite`, where the one there is of another search (saying what differs) or is
        damaged.
        """
        if folder is None:
            return cls(None, identity)
        _check_folder(folder)
        path = folder / RECORD
        if overwrite or not path.exists():
            return cls(folder, identity)
        value = read_json(path, "search")
        found = value.get("identity")
        if value.get("version") != VERSION or not isinstance(found, dict):
            raise BillhookError(
                f"{path} is not a search of version {VERSION}: choose another --output, or --overwrite."
            )
        different = [key for key in identity if found.get(key) != identity[key]]
        if different:
            key = different[0]
            was, now = f"{found.get(key)!r:.60}", f"{identity[key]!r:.60}"
            raise BillhookError(
                f"{path} is of another search: {key} was {was} and is now {now}. Choose another --output, or "
                "--overwrite."
            )
        try:
            trials, full = ([Run.from_json(entry) for entry in value[key]] for key in ("trials", "full"))
        except (KeyError, TypeError, ValueError) as error:
            raise BillhookError(f"{path} is damaged ({error!r}): start again with --overwrite.") from None
        return cls(folder, identity, trials, full)

    def add_trial(self, run: Run) -> None:
        """Note a cheap trial on disk."""
        self.trials.append(run)
        self._write()

    def add_full(self, run: Run) -> None:
        """Note a full run on disk."""
        self.full.append(run)
        self._write()

    def finish(self, best: Run, plan: Plan) -> None:
        """Note the result and write the plan."""
        self.best = {"allocator": best.candidate.allocator, "options": best.candidate.options}
        self.best |= {
            "mean_kl": best.loss("kl"),
            "mean_nll": best.loss("nll"),
            "token_ppl": math.exp(min(best.loss("nll"), 700)),
        }
        if self.folder is not None:
            plan.save(self.folder / PLAN)
        self._write()

    def to_json(self) -> dict[str, Any]:
        """The content of search.json."""
        runs = {"trials": [t.to_json() for t in self.trials], "full": [f.to_json() for f in self.full]}
        return {
            "version": VERSION,
            "billhook": billhook.__version__,
            "best": self.best,
            "identity": self.identity,
            **runs,
        }

    def _write(self) -> None:
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / RECORD, self.to_json())


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise BillhookError(f"The output {folder} is a file: choose a directory.")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise BillhookError(f"Cannot make {folder}: the folder it would be in does not exist. Create it first.")
    if not os.access(folder if folder.exists() else folder.absolute().parent, os.W_OK):
        raise BillhookError(f"Cannot write to {folder}: the folder is not writable.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists():
        raise BillhookError(f"The output {folder} is not empty and holds no search: choose another.")
