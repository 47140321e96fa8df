"""Open and check a request, before anything is measured for its plan or changed."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from billhook.architectures.stacks import blocks_of
from billhook.engine.gradient_file import Gradients, open_gradients
from billhook.engine.method import Method
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO, ON_MODEL, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan, load_plan
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.racing import automatic
from billhook.racing.allocators import registry_of
from billhook.racing.hyperparameters import configure, is_raced
from billhook.steps.gradients import check_temporary_room, gradient_bytes
from billhook.steps.options import split_options
from billhook.steps.prune_job import PruneRequest
from billhook.steps.request import Opened, check_stays, digest_of_json, identity, open_request
from billhook.steps.state import STATE, check_same_run, partial_folder, unfinished_run
from billhook.store.files import sha256
from billhook.store.output import absolute, check_output, check_room
from billhook.store.shards import weight_bytes
from billhook.tasks.base import Progress


@dataclass(frozen=True)
class ResolvedRequest:
    """A checked request.

    * `plan`: the given plan, or that of a resumed run, whose first `done` blocks are finished.
    * `needed`: the metrics to measure, where there is neither a plan nor a `table`.
    * `packed`: the final output of a run whose result is packed.
    * `begun`: when the check began, by `time.perf_counter`.
    """

    request: PruneRequest
    opened: Opened
    method: Method
    allocator_options: dict[str, Any]
    plan: Plan | None
    table: Table | None
    needed: tuple[str, ...]
    gradients: Gradients | None
    identity: Mapping[str, Any]
    packed: Path | None
    done: int
    begun: float

    @property
    def on_trial(self) -> bool:
        """Whether plans are tried on the model, which must then be in memory as a whole for as long as that takes."""
        raced = is_raced(self.request.allocator, self.allocator_options)
        return self.plan is None and (raced or any(fact(name).reads == "trial" for name in self.needed))

    @property
    def target(self) -> float:
        """The requested sparsity."""
        if self.plan is not None:
            return self.plan.target
        return check_budget(self.request.sparsity, Pattern.parse(self.request.pattern))


def check(request: PruneRequest, progress: Progress = lambda step: None, *, dry_run: bool = False) -> ResolvedRequest:
    """Open what a request names and check everything about it, cheapest first; nothing is measured yet.

    Raises BillhookError for an impossible request. A model directory is opened one block at a time where there is an
    output, and for a dry run.
    """
    begun = time.perf_counter()
    method, allocator_options = _methods(request)
    raced = request.plan is None and is_raced(request.allocator, allocator_options)
    table = Table.load(request.table) if isinstance(request.table, str | Path) else request.table
    plan = _given_plan(request, table)
    needed = () if plan or table else _metrics(request, allocator_options)
    gradients = _given_gradients(request, method)
    reads_text = method.observed or (method.gradient and gradients is None) or any(fact(x).needs_text for x in needed)
    needs_samples = bool(reads_text) or raced or request.refine != "none"
    request, packed = _dense_output(request)
    streamed = dry_run or request.output is not None
    named = f" (the recipe {request.followed})" if request.followed else ""
    who = f"Pruning with {request.criterion} and {request.allocator}{named}"
    opened = open_request(request, needs_samples, who, streamed=streamed, progress=progress)
    run = identity(request, opened, {**allocator_options, **method.options}, plan, **_method_of(request, table))
    if gradients is not None:
        gradients.check(method.gradient, {layer.name: layer.shape for layer in opened.layers}, opened.facts)
    resumed, done = _partial_plan(request, opened, run)
    found = ResolvedRequest(
        request, opened, method, allocator_options=allocator_options, plan=resumed or plan, table=table,
        needed=needed, gradients=gradients, identity=run, packed=packed, done=done, begun=begun,
    )  # fmt: skip
    if request.output is not None:
        check_room(absolute(request.output), _room(found, resumed is not None))
    unsaved = request.output is None and gradients is None and not dry_run
    if method.gradient and (found.on_trial or unsaved):
        check_temporary_room(opened.layers)
    return found


def _room(resolved: ResolvedRequest, resumed: bool) -> int:
    """The bytes that a run has still to write beside its output: weights, gradients, and the packed form of the
    weights, which are there until it is whole."""
    opened, method = resolved.opened, resolved.method
    whole = sum(p.nbytes for p in opened.model.parameters()) if opened.source is None else weight_bytes(opened.source)
    gradients = gradient_bytes(opened.layers) if method.gradient and resolved.gradients is None else 0
    room = 0 if resumed else whole + gradients
    if resolved.packed is not None:  # a removed weight costs a bit of at least 16
        pruned = sum(math.prod(layer.shape) for layer in opened.layers) / opened.model.num_parameters()
        room += round(whole * (1 - pruned * max(0.0, resolved.target - 1 / 16)))
    return room


def _methods(request: PruneRequest) -> tuple[Method, dict[str, Any]]:
    """The criterion and the allocator's options, parsed; with `published`, gradients are accumulated as published."""
    arithmetic = request.plan is None and request.allocator != AUTO
    options = dict(request.options)
    if request.published and "mode" in CRITERIA.options(request.criterion):
        options.setdefault("mode", "reference")
    allocators = [request.allocator] if arithmetic else []
    fields, registry = PruneRequest.__dataclass_fields__, registry_of(request.allocator)
    of_criterion, given = split_options(options, request.criterion, allocators, fields, allocating=registry)
    prefix = request.prefix or "pruned"
    method = Method(request.criterion, of_criterion, request.group, request.rounding, prefix)
    return method, configure(request.allocator, given) if arithmetic else {}


def _given_plan(request: PruneRequest, table: Table | None) -> Plan | None:
    """The plan of a request, or None and a valid budget."""
    if request.plan is None:
        check_budget(request.sparsity, Pattern.parse(request.pattern))
        return None
    plan = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
    plan.check_sparsities()
    given = (table, request.allocator, request.sparsity, request.pattern)
    if given != (None, "uniform", None, "unstructured"):
        raise BillhookError(
            "A plan already gives the sparsity of each layer: leave out sparsity, pattern, allocator and table."
        )
    return plan


def _metrics(request: PruneRequest, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The metrics that the request's allocator reads."""
    if request.allocator in ON_MODEL:
        return automatic.needs(request.allocator, request.criterion)
    return ALLOCATORS.needs(request.allocator, options)


def _dense_output(request: PruneRequest) -> tuple[PruneRequest, Path | None]:
    """For a run whose result is packed: the request with OUTPUT.dense as its output, and the final output."""
    if not request.pack or request.output is None:
        return request, None
    source = Path(request.model) if isinstance(request.model, str | Path) and Path(request.model).is_dir() else None
    output = check_output(Path(request.output), source, overwrite=request.overwrite)
    check_stays(request.calibration, output)
    dense = output.with_name(f"{output.name}.dense")
    if dense.exists():
        raise BillhookError(
            f"{dense} exists, where the pruned model is written before it is packed: move it or delete it. If a "
            f"stopped run left it, billhook pack {dense} -o {output} completes that run."
        )
    return replace(request, output=dense), output


def _partial_plan(request: PruneRequest, opened: Opened, run: Mapping[str, Any]) -> tuple[Plan | None, int]:
    """The plan of the run to resume, so that nothing is measured again, and its number of finished blocks; None, 0 for
    a new run.

    Raises BillhookError when the identity of that run is not `run`.
    """
    if not request.resume or request.output is None or opened.source is None:
        return None, 0
    output = absolute(request.output)
    state = unfinished_run(output, resume=True, overwrite=request.overwrite)
    if state is None:
        return None, 0
    check_same_run(state.identity, run, partial_folder(output))
    blocks = [[(x.name, x.shape) for x in opened.layers if x.block == i] for i in range(len(blocks_of(opened.model)))]
    made = [[(result.layer, result.shape) for result in results] for results in state.results]
    if state.blocks != len(blocks) or made != blocks[: state.done]:
        wrong = "its finished layers are not those of the model"
        raise BillhookError(f"{partial_folder(output) / STATE} is damaged (start again with --overwrite): {wrong}.")
    return Plan.from_json(state.plan, str(partial_folder(output))), state.done


def _method_of(request: PruneRequest, table: Table | None) -> dict[str, Any]:
    """What must be the same for a run to be resumed, beside what all commands have in common."""
    gradients = request.gradients.path if isinstance(request.gradients, Gradients) else request.gradients
    same = ("sparsity", "pattern", "allocator", "criterion", "group", "refine", "prefix", "budget")
    return {
        **{key: getattr(request, key) for key in same},
        "table": None if table is None else digest_of_json(asdict(table)),
        "gradients": None if gradients is None else sha256(Path(gradients)),
    }


def _given_gradients(request: PruneRequest, method: Method) -> Gradients | None:
    if request.gradients is None:
        return None
    if not method.gradient:
        raise BillhookError(
            f"The criterion {request.criterion} reads no gradients: leave out --gradients, or use criterion gblm."
        )
    return request.gradients if isinstance(request.gradients, Gradients) else open_gradients(Path(request.gradients))
