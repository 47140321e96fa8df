"""Rows scored in batches whose size is found by itself: large enough to keep a matrix product busy, small enough for
memory.

The size follows from the shapes alone, so that the same inputs give the same bits; where there is less memory than
expected the batch is halved and tried again. Nothing is timed.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from billhook.errors import out_of_memory

TOKENS = 2048  # in a batch: enough rows for a matrix product, few enough for the caches of a CPU
LOGIT_BYTES = 1 << 28  # how much memory the logits of one batch may take

T = TypeVar("T")


def batch_size(length: int, vocabulary: int, itemsize: int) -> int:
    """How many rows of `length` tokens to score at once, for a vocabulary and the bytes that one logit takes."""
    return max(1, min(TOKENS // length, LOGIT_BYTES // (length * vocabulary * itemsize)))


def halving(count: int, size: int, work: Callable[[int, int], T]) -> Iterator[tuple[int, int, T]]:
    """Yield (first, last, work(first, last)) over `count` rows, `size` at a time, halving the size where memory runs
    out.

    Raises what `work` raises; that memory is short, only for a single row.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            result = work(start, stop)
        except (MemoryError, RuntimeError) as error:
            if stop - start == 1 or not out_of_memory(error):
                raise
            size = max(1, (stop - start) // 2)
            continue
        yield start, stop, result
        start = stop
