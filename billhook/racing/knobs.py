"""The knob of each allocator, its range, and which value to try next: a pure function of what was tried before.

The published defaults suit the models of the papers (AlphaPruning's epsilon, ATP's beta, OWL's lam and M); on others
they can be worse than uniform. The default schedule tries five points of each range, then halves the distance around
the best. `grid` gives the published values instead: ATP's beta in steps of 0.002 (arXiv:2502.14770), AlphaPruning's
epsilon (arXiv:2410.10912), OWL's lam and M (arXiv:2310.05175, as searched by later work) and DLP's alpha
(arXiv:2505.23807).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS
from billhook.plan.allocators.atp import largest_beta
from billhook.plan.allocators.presets import OWL_GRID

TICKS = 40  # a range is divided into this many parts
COARSE = (16, 8, 24, 32, 40)  # in this order, so that a small budget still sees the likeliest part
DISTANCES = (4, 2, 1)  # from the best point, in ticks, one after the other
POINTS = 9  # trials a knob gets unless told otherwise: five coarse ones and two at each of two distances
ATP_STEP = 0.002


@dataclass(frozen=True)
class Knob:
    """`name` is the option that is searched in (0, high]; `high` and `grid` are given the number of blocks and the
    target sparsity.

    Zero is the uniform plan; where `falling`, `high` is, and the range is [0, high). `published` are further options,
    with the values that `--grid` combines with the knob's own.
    """

    name: str
    high: Callable[[int, float], float]
    grid: Callable[[int, float], list[float]]
    published: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    falling: bool = False

    def value(self, fraction: float, blocks: int, target: float) -> float:
        """The value at a fraction of the range, counted from uniform."""
        return self.high(blocks, target) * (1 - fraction if self.falling else fraction)


def _atp_grid(blocks: int, target: float) -> list[float]:
    high = largest_beta(blocks, target)
    return [round(i * ATP_STEP, 3) for i in range(1, int(high / ATP_STEP + 1e-9) + 1)]


KNOBS: dict[str, Knob] = {
    "alphapruning": Knob("epsilon", lambda blocks, target: 0.5, lambda blocks, target: [0.1, 0.2, 0.3, 0.4, 0.5]),
    "atp": Knob("beta", largest_beta, _atp_grid),
    "owl": Knob("lam", lambda blocks, target: 0.2, lambda blocks, target: [*OWL_GRID["lam"]], {"m": OWL_GRID["m"]}),
    "dlp": Knob("alpha", lambda blocks, target: 0.3, lambda blocks, target: [0.04, 0.1, 0.15]),
    "sensitivity": Knob("epsilon", lambda blocks, target: 0.5, lambda blocks, target: [0.1, 0.2, 0.3, 0.4, 0.5]),
    "global": Knob(
        "floor",
        lambda blocks, target: 1 - target,
        lambda blocks, target: [x / 10 for x in range(10) if x / 10 < 1 - target],
        falling=True,
    ),
}
ALL = (
    "alphapruning",
    "atp",
    "owl",
    "dlp",
)  # what "all" means: sensitivity costs an evaluation a block, global is rarely a rival


@dataclass(frozen=True)
class Candidate:
    """One thing to try: an allocator with all its options; `tick` is the knob's place in its range, in 40ths (None off
    the schedule)."""

    allocator: str
    options: dict[str, Any]
    tick: int | None = None


@dataclass(frozen=True)
class Outcome:
    """How a candidate did: `score` is its loss minus uniform's on the same windows; `stopped` if it is clearly
    behind."""

    candidate: Candidate
    score: float
    stopped: bool


@dataclass(frozen=True)
class Space:
    """What is searched: allocators, their options that are given and not searched, the number of blocks, the target
    sparsity."""

    allocators: tuple[str, ...]
    given: Mapping[str, Any]
    blocks: int
    target: float
    grid: bool = False

    def check(self) -> None:
        """Raise BillhookError for an unknown allocator or option, or a knob that is given instead of searched."""
        for name in self.allocators:
            ALLOCATORS.configure(name, self._given(name))
            knob = KNOBS.get(name)
            if knob and knob.name in self.given:
                raise BillhookError(f"{knob.name} is what the search chooses for {name}: leave out --set {knob.name}.")

    def candidates(self) -> Iterator[Candidate]:
        """Every candidate that is tried in any case, in order: the grid, or the coarse points; a single one without a
        knob."""
        searched = [
            name for name in self.allocators if name in KNOBS and KNOBS[name].high(self.blocks, self.target) > 0
        ]
        for name in self.allocators:
            if name not in searched:
                yield Candidate(name, ALLOCATORS.configure(name, self._given(name)))
            elif self.grid:
                yield from self._published(name, KNOBS[name])
        for tick in () if self.grid else COARSE:
            yield from (self.at(name, tick) for name in searched)

    def _published(self, name: str, knob: Knob) -> Iterator[Candidate]:
        others: list[dict[str, Any]] = [{}]
        for option, values in knob.published.items():
            if option not in self.given:
                others = [other | {option: value} for other in others for value in values]
        for other in others:
            for value in knob.grid(self.blocks, self.target):
                yield Candidate(name, ALLOCATORS.configure(name, self._given(name) | other | {knob.name: value}))

    def at(self, allocator: str, tick: int) -> Candidate:
        """The candidate at `tick` 40ths of the allocator's range."""
        knob = KNOBS[allocator]
        value = knob.value(tick / TICKS, self.blocks, self.target)
        return Candidate(allocator, ALLOCATORS.configure(allocator, self._given(allocator) | {knob.name: value}), tick)

    def _given(self, allocator: str) -> dict[str, Any]:
        return {key: value for key, value in self.given.items() if key in ALLOCATORS.options(allocator)}

    @property
    def points(self) -> int:
        """How many trials the schedule takes unless told otherwise."""
        return len(list(self.candidates())) + (
            0 if self.grid else (POINTS - len(COARSE)) * sum(a in KNOBS for a in self.allocators)
        )


def propose(space: Space, past: Sequence[Outcome]) -> Candidate | None:
    """What to try after `past` (in any order), or None when the schedule has nothing left.

    Coarse points first. Then, for every allocator whose best point is not clearly behind, the points beside that best
    one at halving distances: the widest distance first, the best allocator first.
    """
    tried = {(o.candidate.allocator, tuple(o.candidate.options.items())) for o in past}
    for candidate in space.candidates():
        if (candidate.allocator, tuple(candidate.options.items())) not in tried:
            return candidate
    if space.grid:
        return None
    best = [min(outcomes, key=lambda o: o.score) for name in space.allocators if (outcomes := _of(past, name))]
    best = sorted((o for o in best if not o.stopped), key=lambda o: o.score)
    for distance in DISTANCES:
        for outcome in best:
            allocator, centre = outcome.candidate.allocator, outcome.candidate.tick or 0
            ticks = {o.candidate.tick for o in _of(past, allocator)}
            for tick in (centre - distance, centre + distance):
                if 0 < tick <= TICKS and tick not in ticks:
                    return space.at(allocator, tick)
    return None


def _of(past: Sequence[Outcome], allocator: str) -> list[Outcome]:
    return [o for o in past if o.candidate.allocator == allocator and o.candidate.tick is not None]
