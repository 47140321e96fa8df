"""search.json: the trials of a search, rewritten after each of them, so that an interrupted search can be continued.

File format: docs/formats/files.md. The same inputs and seed give the same bytes: it has no dates and no durations.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import billhook
from billhook.errors import BillhookError
from billhook.racing.race import Race, Trial
from billhook.store.files import read_json, write_json
from billhook.store.output import check_record_place
from billhook.store.typed_json import typed

VERSION = 2
RECORD, PLAN, PICTURE, MODEL = "search.json", "plan.json", "search.svg", "model"


@dataclass(frozen=True)
class SearchRecord:
    """`identity` is what two runs of a search must agree in, `known` are the trials found in `folder` (None: no file is
    written), and `pruned` says that the best of them was written as a model."""

    folder: Path | None
    identity: dict[str, Any]
    known: dict[str, Trial] = field(default_factory=dict)
    pruned: bool = False

    @classmethod
    def open(cls, folder: Path | None, identity: dict[str, Any], overwrite: bool) -> "SearchRecord":
        """A new record, or the one in `folder`.

        Raises BillhookError where none can be written there, or, unless `overwrite`, the one there is damaged or of
        another search (saying what differs).
        """
        if folder is not None:
            check_record_place(folder, RECORD)
        if folder is None or overwrite or not (folder / RECORD).exists():
            return cls(folder, identity)
        path = folder / RECORD
        value = read_json(path, "search")
        advice = "Choose another --output, or --overwrite."
        if value.get("version") != VERSION or not isinstance(found := value.get("identity"), dict):
            raise BillhookError(f"{path} is not a search of version {VERSION}. {advice}")
        for key, now in identity.items():
            if found.get(key) != now:
                was = f"{key} was {found.get(key)!r:.60} and is now {now!r:.60}"
                raise BillhookError(f"{path} is of another search: {was}. {advice}")
        where = f"{path} is damaged (choose another --output, or --overwrite)"
        trials: list[Trial] = typed(list[Trial], value.get("trials"), f"{where}, trials")
        for trial in trials:
            if not trial.kl or len(trial.kl) != len(trial.nll):
                raise BillhookError(f"{where}, {trial.name}: kl and nll must be as long, and not empty.")
        return cls(folder, identity, {trial.name: trial for trial in trials}, value.get("pruned") is True)

    def write(self, race: Race, *, ended: bool = False, pruned: bool = False) -> dict[str, Any]:
        """Write search.json, if anything is written, and return its content; `best` is None until the race has
        ended."""
        best, nll = race.best, race.best.loss("nll")
        won = {"name": best.name, "allocator": best.allocator, "options": best.options, "mean_kl": best.loss("kl")}
        won |= {"mean_nll": nll} | ({"token_ppl": math.exp(min(nll, 700))} if race.runner.task.unit == "token" else {})
        value = {
            "version": VERSION,
            "billhook": billhook.__version__,
            "best": won if ended else None,
            "pruned": pruned,
            "identity": self.identity,
            "trials": [asdict(trial) for trial in race.trials.values()],
        }
        if self.folder is not None:
            self.folder.mkdir(exist_ok=True)
            write_json(self.folder / RECORD, value)
        return value
