"""Automatic batch size: large enough for efficient matrix products, small enough for memory.

The size depends on the shapes alone, so equal inputs give equal bits. When memory runs out, the batch is halved and
tried again.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

from billhook.errors import out_of_memory

TOKENS = 2048  # in a batch: enough rows for a matrix product, few enough for the caches of a CPU
LOGIT_BYTES = 1 << 28  # the largest size of the logits of one batch

Progress = Callable[[str], None]  # called with what is done

T = TypeVar("T")


def batch_size(length: int, vocabulary: int, itemsize: int) -> int:
    """Rows of `length` tokens to score at once, for the size of the vocabulary and the bytes of a logit."""
    return max(1, min(TOKENS // length, LOGIT_BYTES // (length * vocabulary * itemsize)))


def halving(count: int, size: int, work: Callable[[int, int], T]) -> Iterator[tuple[int, int, T]]:
    """Yield (start, stop, work(start, stop)) over `count` rows, `size` at a time, halved when memory runs out.

    Raises what `work` raises; out of memory only for a single row.
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
