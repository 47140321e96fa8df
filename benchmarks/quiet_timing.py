"""Time variants in turns, and keep only the rounds in which no other process used the machine.

Two threads that meet at a barrier lose milliseconds when a third process takes one of two cores, so a round is
discarded when other processes used more than a tenth of a core during it. Where the system does not report that
(`/proc/stat`), every round counts.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

BUSY = 0.1  # cores
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def _others_s() -> float:
    """Processor seconds that other processes, the kernel's interrupts and other virtual machines have used so far."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupts, soft, steal = (int(field) * TICK_S for field in fields)
    return user + nice + system + interrupts + soft + steal - time.process_time()


def rounds(
    variants: dict[str, Callable[[int], object]], wanted: int, limit_s: float
) -> tuple[dict[str, list[float]], int]:
    """Seconds of every variant in every quiet round, and the number of rounds that were discarded.

    A variant is called with a number that counts up, to choose one of several copies of its data. When the time limit
    is reached first, the quiet rounds so far are returned; if there were none, all rounds are.
    """
    undisturbed: dict[str, list[float]] = {name: [] for name in variants}
    disturbed: dict[str, list[float]] = {name: [] for name in variants}
    discarded, turn, end = 0, 0, time.perf_counter() + limit_s
    while len(next(iter(undisturbed.values()))) < wanted and time.perf_counter() < end:
        taken, others, start = {}, _others_s(), time.perf_counter()
        for name, run in variants.items():
            turn += 1
            before = time.perf_counter()
            run(turn)
            taken[name] = time.perf_counter() - before
        quiet = _others_s() - others <= BUSY * (time.perf_counter() - start) + 2 * TICK_S
        discarded += not quiet
        for name, seconds in taken.items():
            (undisturbed if quiet else disturbed)[name].append(seconds)
    return (undisturbed if any(undisturbed.values()) else disturbed), discarded


def median(values: list[float]) -> float:
    """The middle value."""
    return sorted(values)[len(values) // 2]


def spread(values: list[float]) -> float:
    """Half the interquartile range, relative to the median."""
    ordered = sorted(values)
    return (ordered[3 * len(ordered) // 4] - ordered[len(ordered) // 4]) / 2 / median(values)
