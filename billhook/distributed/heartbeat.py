"""Which of several processes was lost: each tells twice a second that it lives, in the store that torchrun keeps for
them.

A connection that breaks says that somebody is gone, not who. A process that ends because of an error of its own leaves
that error in the store; one that was killed just falls silent. A machine that vanishes breaks no connection at all, and
the others would wait for it for hours: a silence of a minute ends them.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 0.5  # seconds
SILENCE = 4.0  # of a process that is lost, once something broke
PATIENCE = 60.0  # with a process that is silent while nothing broke
AGAIN = "Start the same command again; billhook prune goes on after the last finished block with --resume."
_LEFT, _FAILED = "left", "failed "


class Heartbeat:
    """The signs of life of process `rank` of `world` and its view of the others; `prefix` keeps runs in one store
    apart."""

    def __init__(self, store: "Store", rank: int, world: int, prefix: str = "", patience: float = PATIENCE) -> None:
        self._store, self.rank, self.world, self._patience = store, rank, world, patience
        self._keys = [f"billhook/{prefix}/{number}" for number in range(world)]
        self._store.set(self._keys[rank], "0")
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Begin, once every process has one of these."""
        self._thread.start()

    def leave(self, failure: str = "") -> None:
        """End: done, or with an error of this process's own, which the others are told."""
        self._stop.set()
        self._thread.join(SILENCE)
        with suppress(RuntimeError):  # where nobody is left to tell
            self._store.set(self._keys[self.rank], _FAILED + failure if failure else _LEFT)

    def lost(self) -> str:
        """Once something broke: which processes failed or fell silent, as a sentence; empty when all of the others
        live."""
        waiting = set(range(self.world)) - {self.rank}
        found: list[str] = []
        try:
            first, until = self._look(), time.monotonic() + SILENCE
            while waiting and time.monotonic() < until:
                time.sleep(BEAT / 4)
                now = self._look()
                for number in sorted(waiting):
                    if now[number].startswith(_FAILED):
                        found.append(f"Process {number} of {self.world} failed: {now[number].removeprefix(_FAILED)}")
                    elif now[number] == first[number] != _LEFT:
                        continue
                    waiting.discard(number)
        except RuntimeError:
            return "The store of torchrun cannot be reached, on the machine of process 0 or of this one."
        return " ".join(
            [
                *found,
                *(f"Process {number} of {self.world} was lost: it ended without a word." for number in sorted(waiting)),
            ]
        )

    def _look(self) -> list[str]:
        with self._lock:
            return [value.decode() for value in self._store.multi_get(self._keys)]

    def _beat(self) -> None:
        seen, since = [""] * self.world, [time.monotonic()] * self.world
        count, reached = 0, time.monotonic()
        while not self._stop.wait(BEAT):
            count += 1
            try:
                with self._lock:
                    self._store.set(self._keys[self.rank], str(count))
                now = self._look()
            except RuntimeError:
                if time.monotonic() - reached > self._patience:
                    self._end(f"torchrun was lost{self._unheard()}")
                continue
            reached = time.monotonic()
            for number, value in enumerate(now):
                if value != seen[number]:
                    seen[number], since[number] = value, reached
                elif value != _LEFT and reached - since[number] > self._patience:
                    who = f"process {number} of {self.world}"
                    if value.startswith(_FAILED):
                        self._end(f"{who} failed: {value.removeprefix(_FAILED).rstrip('.')}.")
                    self._end(f"{who} was lost{self._unheard()}")

    def _unheard(self) -> str:
        return f" (nothing heard for {self._patience:.0f} s)."

    def _end(self, why: str) -> None:
        """End this process, whose main thread may wait for ever; what a run leaves can be continued at any moment."""
        print(f"billhook, process {self.rank} of {self.world}: {why} {AGAIN}", file=sys.stderr, flush=True)
        os._exit(1)
