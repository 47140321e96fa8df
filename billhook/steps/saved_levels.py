"""Measurements of an unfinished choice of types: billhook.levels.json in OUTPUT.partial.

It is replaced atomically after every block, so that a run that ends at any moment measures only the rest when it is
started again.

The file is read only by a run for which everything that it depends on is the same; it disappears when the first block
is quantized, because the plan is kept from then on.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, Interrupted
from billhook.store.files import json_text, read_json, replace_file
from billhook.store.layout import LEVELS
from billhook.store.typed_json import typed

VERSION = 2  # of the measurements: raised when a number is measured in another way


@contextmanager
def resume_advice(saved: Path, again: str) -> Iterator[None]:
    """Say at Ctrl-C that the file or folder `saved` is there, if it is, and with what command a run uses it `again`."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stopped:
        if not saved.exists() or (isinstance(stopped, Interrupted) and not stopped.stopped):
            raise
        what = f"Stopped. What is finished is kept in {saved}: {again}."
        raise Interrupted(what, stopped=True, advised=True) from None


@dataclass(frozen=True)
class Measurements:
    """What was measured so far, by name of layer (and type): `errors` and `power` as in `LevelErrors`, the Fisher
    `information`, and the `losses` of embeddings and head; `identity` is what they depend on."""

    identity: dict[str, Any]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    power: dict[str, float] = field(default_factory=dict)
    information: dict[str, float] = field(default_factory=dict)
    losses: dict[str, dict[str, float]] = field(default_factory=dict)


class SavedLevels:
    """The measurements in a folder, which is created for the first ones (None: they are kept nowhere)."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = None if folder is None else folder / LEVELS
        self.found = Measurements(json.loads(json_text({**identity, "measurements": VERSION})))
        if self._path is None or not self._path.is_file():
            return
        try:
            kept: Measurements = typed(Measurements, read_json(self._path, "measurements"), str(self._path))
        except BillhookError:  # damaged: measured again
            return
        if kept.identity == self.found.identity:
            self.found = kept

    def keep(self, **measured: Any) -> None:
        """Add measurements, by the names of the fields of `Measurements`, and write all of them."""
        self.found = replace(self.found, **measured)
        if self._path is not None:
            self._path.parent.mkdir(exist_ok=True)
            text = json_text(asdict(self.found))
            replace_file(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def forget(self) -> None:
        """Delete the file, and its folder if nothing else is in it."""
        if self._path is not None and self._path.parent.is_dir():
            self._path.unlink(missing_ok=True)
            if not any(self._path.parent.iterdir()):
                self._path.parent.rmdir()
