"""Whether torchrun started this process, and as which of several; known without loading torch."""

import os


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and processes() > 1


def processes() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The number of this process; the first one, 0, talks and writes."""
    return int(os.environ.get("RANK", "0")) if started() else 0
