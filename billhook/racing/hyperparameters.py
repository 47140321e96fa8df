"""The hyperparameter of each allocator, its range, and the order in which a race tries its values.

The published values suit the models of the papers; on others they can be worse than uniform. A race tries the fractions
`COARSE` of each range, then the midpoints between the best value and its neighbours, but not of allocators that are
clearly behind another one. `grid` tries the published values instead: ATP's beta in steps of 0.002 (arXiv:2502.14770),
AlphaPruning's epsilon (arXiv:2410.10912), OWL's lam and M (arXiv:2310.05175, as searched by EvoPress' code) and DLP's
alpha (arXiv:2505.23807).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.allocators import ALLOCATORS, AUTO, ON_MODEL
from billhook.plan.allocators.atp import beta_grid, largest_beta
from billhook.racing.allocators import registry_of
from billhook.racing.race import AllocationProblem, Candidate, Race, Trial

RACED = (AUTO, "alphapruning", "atp", "owl", "dlp")  # sensitivity needs an evaluation a block, and others rarely win
OWL_GRID = {"lam": (0.02, 0.05, 0.08, 0.1, 0.2), "m": (3.0, 5.0, 7.0, 10.0)}  # EvoPress' code, arXiv:2410.14649
COARSE = (0.4, 0.2, 0.7, 1.0)  # in this order, so that a small budget sees the most likely part of the range
MIDPOINTS = 2  # at most


@dataclass(frozen=True)
class Hyperparameter:
    """The option `name`, from the value that gives the uniform plan to the other end of its `span`.

    `span` and `published` are functions of the number of blocks and the target sparsity. `others` are further options
    with the values that are combined with the published ones.
    """

    name: str
    span: Callable[[int, float], tuple[float, float]]
    published: Callable[[int, float], Sequence[float]]
    others: Mapping[str, Sequence[float]] = field(default_factory=dict)


_EPSILON = Hyperparameter("epsilon", lambda blocks, s: (0.0, 0.5), lambda blocks, s: (0.1, 0.2, 0.3, 0.4, 0.5))
HYPERPARAMETERS: dict[str, Hyperparameter] = {
    "alphapruning": _EPSILON,
    "atp": Hyperparameter("beta", lambda blocks, s: (0.0, largest_beta(blocks, s)), beta_grid),
    "owl": Hyperparameter("lam", lambda blocks, s: (0.0, 0.2), lambda blocks, s: OWL_GRID["lam"], {"m": OWL_GRID["m"]}),
    "dlp": Hyperparameter("alpha", lambda blocks, s: (0.0, 0.3), lambda blocks, s: (0.04, 0.1, 0.15)),
    "sensitivity": _EPSILON,
    "global": Hyperparameter(
        "floor", lambda blocks, s: (1 - s, 0.0), lambda blocks, s: [x / 10 for x in range(10) if x / 10 < 1 - s]
    ),
}


def every() -> list[str]:
    """All allocators that need nothing but the model and text, plugins too; `auto` includes `curves`."""
    return [AUTO, *(name for name in ALLOCATORS.names() if name not in ("explicit", "curves"))]


def is_raced(allocator: str, options: Mapping[str, Any]) -> bool:
    """Whether a race must decide: the allocator needs the model, or its hyperparameter is given as `auto`."""
    known = HYPERPARAMETERS.get(allocator)
    return allocator in ON_MODEL or (known is not None and options.get(known.name) == AUTO)


def configure(allocator: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The allocator's options, parsed; its hyperparameter stays `auto` where a race is to choose it."""
    auto = {key: value for key, value in given.items() if value == AUTO and is_raced(allocator, given)}
    return registry_of(allocator).configure(allocator, {k: v for k, v in given.items() if k not in auto}) | auto


@dataclass(frozen=True)
class Space:
    """What is searched: the hyperparameters of `allocators`, with further options `given`, for a number of blocks and a
    target sparsity. `auto` among the allocators is left to `billhook.racing.automatic`."""

    allocators: tuple[str, ...]
    given: Mapping[str, Any]
    blocks: int
    target: float
    grid: bool = False

    def first(self) -> list[tuple[str, dict[str, Any]]]:
        """The allocators and options that are tried in any case: uniform, then in turns those of each allocator.

        Raises BillhookError for an unknown allocator or option, or where a hyperparameter is given.
        """
        names = [name for name in self.allocators if name != AUTO]
        turns = zip_longest(*([(name, options) for options in self._options(name)] for name in names))
        return [("uniform", {}), *(each for turn in turns for each in turn if each is not None)]

    def most(self) -> int:
        """The largest number of trials of these beside uniform's."""
        return len(self.first()) - 1 + (0 if self.grid else MIDPOINTS * sum(map(self.has_range, self.allocators)))

    def columns(self) -> list[str]:
        """The columns that the allocators read."""
        return list(dict.fromkeys(key for name, options in self.first() for key in ALLOCATORS.needs(name, options)))

    def schedule(self, problem: AllocationProblem, race: Race) -> Iterator[Candidate]:
        """The candidates in the order in which they are tried."""
        for name, options in self.first():
            yield problem.candidate(name, options)
        for name in () if self.grid else filter(self.has_range, self.allocators):
            tried = {self.fraction(t): t for t in race.trials.values() if t.allocator == name}
            centre = min(tried, key=lambda fraction: race.against_uniform(tried[fraction])[0], default=0.0)
            if centre and (race.best.name == "uniform" or not race.behind(tried[centre])):
                smaller, larger = ([x for x in tried if (x - centre) * sign > 0] for sign in (-1, 1))
                for other in (max(smaller, default=0.0), *([min(larger)] if larger else [])):
                    yield problem.candidate(name, self._at(name, (centre + other) / 2))

    def fraction(self, trial: Trial) -> float:
        """Where in its range the hyperparameter of a trial lies; 0 is uniform."""
        known = HYPERPARAMETERS[trial.allocator]
        uniform, end = known.span(self.blocks, self.target)
        return float(trial.options[known.name] - uniform) / (end - uniform)

    def has_range(self, allocator: str) -> bool:
        """Whether the allocator has a hyperparameter with more than one value."""
        known = HYPERPARAMETERS.get(allocator)
        return known is not None and len(set(known.span(self.blocks, self.target))) == 2

    def _at(self, allocator: str, fraction: float) -> dict[str, Any]:
        """The options at a fraction of the hyperparameter's range."""
        known = HYPERPARAMETERS[allocator]
        uniform, end = known.span(self.blocks, self.target)
        inside = float(f"{uniform + fraction * (end - uniform):.10g}")  # 0.04 and not 0.04000000000000001
        value = end if fraction == 1 else inside
        return ALLOCATORS.configure(allocator, {**self._given(allocator), known.name: value})

    def _options(self, allocator: str) -> list[dict[str, Any]]:
        """The options of one allocator that are tried in any case."""
        given = self._given(allocator)
        if not self.has_range(allocator):
            return [ALLOCATORS.configure(allocator, given)]
        known = HYPERPARAMETERS[allocator]
        if known.name in given:
            raise BillhookError(
                f"{known.name} is what the search chooses for {allocator}: leave out --set {known.name}."
            )
        if not self.grid:
            return [self._at(allocator, fraction) for fraction in COARSE]
        combined = [given | {known.name: value} for value in known.published(self.blocks, self.target)]
        for option, values in known.others.items():
            if option not in given:
                combined = [{**one, option: value} for value in values for one in combined]
        return [ALLOCATORS.configure(allocator, one) for one in combined]

    def _given(self, allocator: str) -> dict[str, Any]:
        return {key: value for key, value in self.given.items() if key in ALLOCATORS.options(allocator)}
