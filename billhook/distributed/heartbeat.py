"""Heartbeats that show which process of a run was lost: each writes twice a second to torchrun's store.

A broken connection does not say which process is gone. A process that fails leaves its error in the store; a killed one
stops its heartbeat. A machine that disappears breaks no connection, and the others would wait for hours: they end after
a minute without its heartbeat.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT = 0.5  # seconds between heartbeats
SILENCE = 4.0  # seconds without a heartbeat after which a process is lost, once a connection broke
TIMEOUT = 60.0  # the same while no connection broke
AGAIN = "Start the same command again; with --resume, prune, slim and recover continue where they stopped."
_LEFT, _FAILED = "left", "failed "


class Heartbeat:
    """The heartbeat of process `rank` of `world`, and its view of the others; `prefix` separates runs in one store."""

    def __init__(self, store: "Store", rank: int, world: int, prefix: str = "", timeout: float = TIMEOUT) -> None:
        self._store, self.rank, self.world, self._timeout = store, rank, world, timeout
        self._keys = [f"billhook/{prefix}/{number}" for number in range(world)]
        self._store.set(self._keys[rank], "0")
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Start, once every process has created its heartbeat."""
        self._thread.start()

    def leave(self, failure: str = "") -> None:
        """End: done, or with an error of this process, which the others can read."""
        self._stop.set()
        self._thread.join(SILENCE)
        with suppress(RuntimeError):  # the store may be gone
            self._store.set(self._keys[self.rank], _FAILED + failure if failure else _LEFT)

    def lost(self) -> str:
        """After a broken connection: which processes failed or were lost, as a sentence; empty if all others live."""
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
        found += [f"Process {number} of {self.world} was lost: it ended without a word." for number in sorted(waiting)]
        return " ".join(found)

    def _look(self) -> list[str]:
        with self._lock:
            return [value.decode() for value in self._store.multi_get(self._keys)]

    def _beat(self) -> None:
        seen, since = [""] * self.world, [time.monotonic()] * self.world
        count, reached, silent = 0, time.monotonic(), f" (nothing heard for {self._timeout:.0f} s)."
        while not self._stop.wait(BEAT):
            count += 1
            try:
                with self._lock:
                    self._store.set(self._keys[self.rank], str(count))
                now = self._look()
            except RuntimeError:
                if time.monotonic() - reached > self._timeout:
                    self._end(f"torchrun was lost{silent}")
                continue
            reached = time.monotonic()
            for number, value in enumerate(now):
                if value != seen[number]:
                    seen[number], since[number] = value, reached
                elif value != _LEFT and reached - since[number] > self._timeout:
                    who = f"process {number} of {self.world}"
                    if value.startswith(_FAILED):
                        self._end(f"{who} failed: {value.removeprefix(_FAILED).rstrip('.')}.")
                    self._end(f"{who} was lost{silent}")

    def _end(self, why: str) -> None:
        """End this process, whose main thread may wait forever; the run can be resumed."""
        print(f"billhook, process {self.rank} of {self.world}: {why} {AGAIN}", file=sys.stderr, flush=True)
        os._exit(1)
