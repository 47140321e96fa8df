"""How `slim` decides how many parts of each unit stay: an allocator and a shape.

An allocator of the registry gives a sparsity to every layer; a unit loses the mean of those of its layers, weighted by
their sizes. `curves`, `auto` (`billhook.racing.units`) and `rco` (`billhook.racing.unit_levels`) measure the units
themselves, which needs the whole model in memory.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.architectures.layers import Layer, find_layers
from billhook.architectures.slim_config import experts_per_token
from billhook.architectures.units import Unit
from billhook.engine.batch import rows_of
from billhook.engine.removal import Removal
from billhook.engine.walk import Progress
from billhook.errors import BillhookError
from billhook.measurement.measure import measure
from billhook.methods.structured import STRUCTURED
from billhook.plan.allocators import ALLOCATORS, AUTO
from billhook.plan.budget import mean
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.plan.unit_counts import Shape, Size
from billhook.racing.allocators import MODEL_ALLOCATORS
from billhook.racing.unit_levels import choose_by_descent
from billhook.racing.units import UnitProblem, choose_counts
from billhook.registry import hint
from billhook.steps.options import split_options
from billhook.steps.request import Opened
from billhook.steps.slim_job import SlimRequest
from billhook.trials.heldout import split_samples
from billhook.trials.unit_trials import UnitRunner


@dataclass(frozen=True)
class UnitAllocation:
    """A checked choice of an allocator with all its options, and the shape."""

    name: str
    options: Mapping[str, Any]
    shape: Shape

    @classmethod
    def of(cls, request: SlimRequest, kinds: Sequence[str]) -> tuple["UnitAllocation", dict[str, Any]]:
        """The allocation, and the options of the structured method; raises BillhookError for unknown names, and for an
        allocator beside a plan."""
        if request.plan is not None and request.allocator:
            raise BillhookError("A plan already says how many parts of each unit stay: leave out the allocator.")
        name = request.allocator or (AUTO if list(kinds) == [AUTO] else "uniform")
        known = [*ALLOCATORS.names(), *MODEL_ALLOCATORS.names(), AUTO]
        if name not in known:
            raise BillhookError(f"Unknown allocator {name!r:.40}.{hint(name, known)} There are: {', '.join(known)}.")
        given = [] if name == AUTO else [name]
        registry = MODEL_ALLOCATORS if name in MODEL_ALLOCATORS.names() else ALLOCATORS
        of_method, options = split_options(
            request.options, request.method, given, methods=STRUCTURED, allocating=registry
        )
        _check_used(request, name, kinds, options)
        implied: Shape = "uniform" if not request.allocator or name == "uniform" else "per-layer"
        options = {**registry.configure(name, options)} if given else {}
        if name == "curves":
            options["criterion"] = request.method
        return cls(name, options, request.shape or implied), of_method

    @property
    def on_trial(self) -> bool:
        """Whether it needs the model in memory, and text."""
        return self.name in (AUTO, "curves", *MODEL_ALLOCATORS.names())

    @property
    def needs_text(self) -> bool:
        """Whether it looks at calibration text."""
        return self.on_trial or any(fact(name).needs_text for name in ALLOCATORS.needs(self.name, self.options))


def _check_used(request: SlimRequest, allocator: str, kinds: Sequence[str], given: Collection[str]) -> None:
    """Raise BillhookError for an option that nothing would read; `given` are those of the allocator."""
    chosen = {"experts": (request.experts, "obs", "experts"), "drop_by": (request.drop_by, "kl", "blocks")}
    for key, (value, default, kind) in chosen.items():
        if value != default and kind not in kinds and list(kinds) != [AUTO]:
            raise BillhookError(f"No {kind} go here, so nothing reads {key}={value!r}: leave it out.")
    inside = [kind for kind in kinds if kind not in ("blocks", AUTO)]  # of a block
    if request.shape == "uniform" and len(inside) == 1 and request.allocator not in ("", "uniform"):
        raise BillhookError(
            f"In a uniform shape the allocator decides only between kinds of units, and only {inside[0]} go here: "
            "leave out the allocator or the shape."
        )
    if allocator == "curves" and "criterion" in given:
        raise BillhookError("The curves of slim are those of its method: leave out criterion, or choose --method.")
    unused = [key for key in request.options if key not in given]
    if unused and list(kinds) == ["experts"]:  # the method also makes up for blocks
        raise BillhookError(
            f"Structured method {request.method!r} removes channels and heads, and only experts go here: leave out "
            f"--set {unused[0]}."
        )


def allocate_units(
    allocation: UnitAllocation, opened: Opened, units: Sequence[Unit], problem: UnitProblem, removal: Removal,
    *, experts: str = "obs", gone: Sequence[int] = (), seed: int = 0, progress: Progress = lambda line: None,
) -> Plan:  # fmt: skip
    """The plan of an allocation for `units`, without the blocks numbered `gone`.

    The model is in memory where the allocation is `on_trial`. One kind in a uniform shape leaves nothing to decide.
    Raises BillhookError where there is too little text.
    """
    if allocation.shape == "uniform" and len({unit.kind for unit in units}) == 1:
        return problem.plan(dict.fromkeys((unit.name for unit in units), 1.0), "uniform", {})  # nothing to decide
    if not allocation.on_trial:
        every = find_layers(opened.model)
        layers = {unit.name: layers_of(unit, every) for unit in units}
        fractions = _fractions(allocation, opened, layers, problem, progress)
        return problem.plan(fractions, allocation.name, allocation.options)
    assert opened.samples is not None
    split = split_samples(opened.model, opened.samples, rows_of(opened.batches[0]), seed)
    facts = {"heldout": split.facts["heldout"]}
    with UnitRunner(opened.model, units, split.batches, split.heldout, removal, experts=experts, gone=gone) as runner:
        if allocation.name in MODEL_ALLOCATORS.names():
            return choose_by_descent(runner, problem, allocation.options, facts, progress)
        return choose_counts(runner, problem, facts, trials=allocation.name == AUTO, progress=progress)


def layers_of(unit: Unit, layers: Sequence[Layer]) -> list[Layer]:
    """The layers of which a unit's parts are rows, columns or whole matrices."""
    if unit.consumer is not None and unit.consumer.expert is not None:
        return [x for x in layers if x.module is unit.consumer.module and x.expert == unit.consumer.expert]
    return [x for x in layers if x.name.startswith(f"{unit.name.rpartition(':')[0]}.")]


def _fractions(
    allocation: UnitAllocation, opened: Opened, layers: Mapping[str, Sequence[Layer]], problem: UnitProblem,
    progress: Progress,
) -> dict[str, float]:  # fmt: skip
    """What each unit loses: the mean over its layers of what the allocator gives them."""
    assert problem.sparsity is not None
    if allocation.name == "uniform":
        return dict.fromkeys(layers, problem.sparsity)
    every = list({layer.name: layer for several in layers.values() for layer in several}.values())
    wanted = ALLOCATORS.needs(allocation.name, allocation.options)
    table: Table = measure(
        opened.model, wanted, batches=opened.batches, layers=every, resources=opened.resources, progress=progress
    )
    found = ALLOCATORS.get(allocation.name)(table, problem.sparsity, **allocation.options)
    sizes = {row.layer: row.n for row in table}
    return {
        name: mean([found[layer.name] for layer in several], [sizes[layer.name] for layer in several])
        for name, several in layers.items()
    }


def sizes_of(units: Sequence[Unit], config: Any) -> list[Size]:
    """The sizes of units; at least as many experts stay as every token goes to."""
    least = {"experts": experts_per_token(config)}
    names = {unit.name for unit in units}
    inside = {unit.name: f"{unit.name.rpartition('.experts.')[0]}:experts" for unit in units}
    inside = {name: experts for name, experts in inside.items() if experts in names}
    facts = [(u.name, u.kind, u.block, u.count, u.parameters, least.get(u.kind, 1)) for u in units]
    return [Size(*fact, inside.get(fact[0], "")) for fact in facts]
