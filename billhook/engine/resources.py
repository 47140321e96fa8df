"""Where a job keeps its data: weights in memory or streamed from disk, activations in memory or spilled to disk.

Decided once, when a job opens its model (`billhook.steps.request`), and passed on explicitly.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from billhook.engine.activation_store import SPILL_GIB, ActivationStore
from billhook.engine.streaming import Stream


@dataclass(frozen=True)
class Resources:
    """`stream` reads one block at a time from disk (None: the whole model is in memory).

    Activations beyond `spill_gib` GiB go to temporary files in `folder` (None: the system's default).
    """

    stream: Stream | None = None
    spill_gib: float = SPILL_GIB
    folder: Path | None = None

    @property
    def streamed(self) -> bool:
        """Whether only one block at a time is in memory."""
        return self.stream is not None

    def block(self, index: int, *, ahead: int | None = None, source: bool = False) -> AbstractContextManager[None]:
        """Keep the weights of block `index` in memory; changes to them are lost when the context ends.

        With `source` they are the original weights, even if the block was written to another directory since. On a GPU,
        block `ahead` is read in the background. Does nothing if the whole model is in memory.
        """
        return nullcontext() if self.stream is None else self.stream.block(index, ahead, source)

    def activations(self) -> ActivationStore:
        """An empty store for hidden states."""
        return ActivationStore(self.spill_gib, self.folder)


IN_MEMORY = Resources()
