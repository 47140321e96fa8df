"""Whether torchrun started this process, and its rank, from the environment (without torch)."""

import os


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return "TORCHELASTIC_RUN_ID" in os.environ and processes() > 1


def processes() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The rank of this process; process 0 prints and writes."""
    return int(os.environ.get("RANK", "0")) if started() else 0
