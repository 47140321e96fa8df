"""A request that is opened and checked, before anything is measured for its plan or changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from billhook.engine.gradient_file import Gradients, open_gradients
from billhook.engine.loop import Method
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators import ALLOCATORS, AUTO, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan, load_plan
from billhook.plan.spec import Pattern
from billhook.plan.table import Table
from billhook.racing import automatic
from billhook.racing.hyperparameters import configure, is_raced
from billhook.steps.options import split_options
from billhook.steps.request import Opened, Request, identity, open_request
from billhook.steps.state import check_place, check_same_run, partial_folder
from billhook.store.output import check_output
from billhook.tasks.base import Progress


@dataclass(frozen=True)
class ResolvedRequest:
    """What was checked.

    `plan` is the plan that was given, or that of a run that is resumed, of which `done` blocks are finished. Where
    there is none, `needed` are the columns to measure first, unless a `table` was given. `packed` is where the packed
    result goes, if it is to be packed.
    """

    request: Request
    opened: Opened
    method: Method
    allocator_options: dict[str, Any]
    plan: Plan | None
    table: Table | None
    needed: tuple[str, ...]
    gradients: Gradients | None
    identity: Mapping[str, Any]
    packed: Path | None
    done: int = 0

    @property
    def in_memory(self) -> bool:
        """Whether the plan needs the whole model in memory."""
        raced = self.plan is None and is_raced(self.request.allocator, self.allocator_options)
        return _in_memory(raced, self.needed if self.plan is None else ())

    @property
    def target(self) -> float:
        """The sparsity that is asked for."""
        return (
            check_budget(self.request.sparsity, Pattern.parse(self.request.pattern))
            if self.plan is None
            else self.plan.target
        )


def check(request: Request, progress: Progress = lambda step: None, *, dry_run: bool = False) -> ResolvedRequest:
    """Open what a request names and check everything about it, cheapest first; nothing is measured yet.

    A model directory is opened one block at a time where an output is asked for, and for a dry run.
    """
    arithmetic = request.plan is None and request.allocator != AUTO
    allocators = [request.allocator] if arithmetic else []
    criterion_options, given = split_options(
        _published(request), request.criterion, allocators, Request.__dataclass_fields__
    )
    method = Method(request.criterion, criterion_options, request.group, request.rounding)
    allocator_options = configure(request.allocator, given) if arithmetic else {}
    raced = request.plan is None and is_raced(request.allocator, allocator_options)
    plan = _given_plan(request)
    table = Table.load(request.table) if isinstance(request.table, str | Path) else request.table
    if plan is None:
        check_budget(request.sparsity, Pattern.parse(request.pattern))
    elif (
        table is not None
        or request.allocator != "uniform"
        or request.sparsity is not None
        or request.pattern != "unstructured"
    ):
        raise BillhookError(
            "A plan already says how much each layer loses: leave out sparsity, pattern, allocator and table."
        )
    needed = () if plan or table else _columns(request, allocator_options)
    gradients = _given_gradients(request, method)
    computed = method.gradient and gradients is None
    needs_samples = method.observed or computed or any(fact(name).needs_text for name in needed)
    needs_samples = bool(needs_samples) or raced or request.refine != "none"
    request, packed = _dense_place(request)
    who = f"Pruning with {request.criterion} and {request.allocator}"
    streamed = (dry_run or request.output is not None) and not _in_memory(raced, needed)
    opened = open_request(request, needs_samples, who, streamed=streamed, progress=progress)
    asked = identity(request, opened, {**allocator_options, **criterion_options}, plan, table)
    if gradients is not None:
        gradients.check(method.gradient, {layer.name: layer.shape for layer in opened.layers}, opened.facts)
    continued, done = _partial_plan(request, opened, asked)
    return ResolvedRequest(
        request,
        opened,
        method,
        allocator_options,
        continued or plan,
        table,
        needed,
        gradients,
        asked,
        packed,
        done,
    )


def _published(request: Request) -> dict[str, Any]:
    """The options of a request; with `published`, gradients are accumulated as the released code does it."""
    options = dict(request.options)
    if request.published and "mode" in CRITERIA.options(request.criterion):
        options.setdefault("mode", "reference")
    return options


def _given_plan(request: Request) -> Plan | None:
    """The plan of a request, None where one is to be made; raises BillhookError for one that is not of sparsities."""
    plan = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
    if plan is not None:
        plan.check_sparsities()
    return plan


def _in_memory(raced: bool, needed: Sequence[str]) -> bool:
    return raced or any(fact(name).reads == "trial" for name in needed)


def _columns(request: Request, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of the table that the request's allocator reads."""
    return (
        automatic.needs(request.criterion)
        if request.allocator == AUTO
        else ALLOCATORS.needs(request.allocator, options)
    )


def _dense_place(request: Request) -> tuple[Request, Path | None]:
    """For a run whose result is packed: the request with a place beside the output instead, and the output."""
    if not request.pack or request.output is None:
        return request, None
    source = Path(request.model) if isinstance(request.model, str | Path) and Path(request.model).is_dir() else None
    output = check_output(Path(request.output), source, overwrite=request.overwrite)
    dense = output.with_name(f"{output.name}.dense")
    if dense.exists():
        raise BillhookError(
            f"{dense} is in the way: the pruned model is written there before it is packed. Move it or delete it; "
            f"if it is what a stopped run left, billhook pack {dense} -o {output} does the rest."
        )
    return replace(request, output=dense), output


def _partial_plan(request: Request, opened: Opened, asked: Mapping[str, Any]) -> tuple[Plan | None, int]:
    """The plan of the run that `request` is to continue, so that nothing is measured again, and its finished blocks;
    None, 0 for a new one.

    Raises BillhookError when that run was asked for something else than `asked`.
    """
    if not request.resume or request.output is None or opened.source is None:
        return None, 0
    output = Path(request.output).expanduser().resolve()
    state = check_place(output, resume=True, overwrite=request.overwrite)
    if state is None:
        return None, 0
    check_same_run(state.identity, asked, partial_folder(output))
    return Plan.from_json(state.plan, str(partial_folder(output))), state.done


def _given_gradients(request: Request, method: Method) -> Gradients | None:
    if request.gradients is None:
        return None
    if not method.gradient:
        raise BillhookError(
            f"The criterion {request.criterion} reads no gradients: leave --gradients out, or take criterion gblm."
        )
    return request.gradients if isinstance(request.gradients, Gradients) else open_gradients(Path(request.gradients))
