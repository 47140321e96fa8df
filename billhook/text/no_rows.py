"""Whether a local dataset has no rows, of which `datasets` and its dependencies speak in words of their own."""

import gzip
import json
from contextlib import suppress
from itertools import islice
from pathlib import Path

_STATE = "state.json"  # of one split that `save_to_disk` wrote


def has_no_rows(path: Path, kind: str, split: str) -> bool:
    """Whether a file of rows (`kind` is its suffix) has none, or the `split` in a folder that `save_to_disk` wrote;
    False where the file or folder is damaged, which loading it reports."""
    with suppress(Exception):  # whatever the package pyarrow raises
        if path.is_dir():
            state = path / _STATE if (path / _STATE).is_file() else path / split / _STATE
            return json.loads(state.read_text(encoding="utf-8"))["_data_files"] == []
        if kind == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]

            return int(pyarrow.parquet.read_metadata(path).num_rows) == 0
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            return len(list(islice((line for line in file if line.strip()), 2))) < 2  # one is the header
    return False
