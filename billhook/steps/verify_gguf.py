"""Check a GGUF file against the billhook.json beside it: its checksum is checked elsewhere, its content here."""

from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np

from billhook.errors import BillhookError
from billhook.store.gguf_file import read_gguf
from billhook.store.record import Record

_OUTSIDE = ("token_embd.weight", "output.weight")


def examine_gguf(path: Path, record: Record, progress: Callable[[str], None]) -> tuple[int, int, list[str]]:
    """The zeros and the number of the layers' weights, and every difference from the record as a sentence.

    The types of the quantized layers, their zeros and that all values are finite are compared; one tensor is in memory
    at a time.
    """
    try:
        file = read_gguf(path)
    except BillhookError as error:
        return 0, 0, [str(error)]
    quantized = [facts for facts in record.layers.values() if facts.get("type")]  # others are left as they were
    recorded, found = Counter[str](), Counter[str]()  # numbers of weights: a tensor may hold several layers, or a part
    for facts in quantized:
        recorded[str(facts["type"])] += prod(facts["shape"])
    for name, entry in file.tensors.items():
        if name not in _OUTSIDE and entry.type in recorded:
            found[entry.type] += prod(entry.shape)
    problems = []
    if found != recorded:
        problems = [f"{path.name} has weights of layers of the types {dict(found)}, not {dict(recorded)}."]
    zeros = weights = 0
    for name, entry in file.tensors.items():
        values = file.values(entry)
        if not np.isfinite(values).all():
            problems.append(f"{name} holds NaN or infinite values.")
        if name not in _OUTSIDE and entry.type in recorded:
            zeros, weights = zeros + int((values == 0).sum()), weights + values.size
        progress(name)
    expected = sum(facts["zeros"] for facts in quantized)
    if not problems and zeros != expected:
        problems.append(f"{path.name} has {zeros} zeros in its layers, {expected} are recorded.")
    return zeros, weights, problems
