"""The log of a run (`--log-file`), one JSON object per line: start, layer, warning, end.

Every line has `event` and `seconds` since the start, and is written to the file at once. Under torchrun every process
except the first writes to a file of its own: run.jsonl, run.rank1.jsonl, ...
"""

import time
from pathlib import Path
from typing import Any

from billhook.distributed.torchrun import rank
from billhook.store.files import check_new_file, json_text


class Log:
    """Writes events to a file, appending if `resume`; without a path it does nothing."""

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        if path is not None and rank():
            path = path.with_name(f"{path.stem}.rank{rank()}{path.suffix}")
        if path is not None:
            check_new_file(path)
        self._file = None if path is None else open(path, "a" if resume else "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._start = time.perf_counter()

    def event(self, name: str, **facts: Any) -> None:
        """Write one event."""
        if self._file is not None:
            line = {"event": name, "seconds": round(time.perf_counter() - self._start, 3), **facts}
            self._file.write(json_text(line, indent=None))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is not None:
            self.event("end", error=str(error) or kind.__name__)
        if self._file is not None:
            self._file.close()
