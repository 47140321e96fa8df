"""A request that is opened and checked, before anything is measured for its plan or changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from billhook.engine.gradient_file import Gradients, open_gradients
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.methods.statistics import GRADIENTS
from billhook.plan.allocators import ALLOCATORS, AUTO, check_budget
from billhook.plan.metrics import fact
from billhook.plan.plan import Pattern, SparsityPlan, load_plan
from billhook.plan.table import Table
from billhook.racing import automatic
from billhook.racing.hyperparameters import configure, is_raced
from billhook.steps.options import split_options
from billhook.steps.record import gradient_of
from billhook.steps.request import Opened, Request, identity, open_request
from billhook.steps.state import check_place, compare, partial_folder
from billhook.store.output import check_output


@dataclass(frozen=True)
class ResolvedRequest:
    """What was checked. `plan` is the one given, or that of a run that goes on, `done` of whose blocks are finished;
    where there is none, `needed` are the columns to measure first, unless `table` was given; the result goes to
    `packed` in the end, if it is to be packed."""

    request: Request
    opened: Opened
    criterion_options: dict[str, Any]
    allocator_options: dict[str, Any]
    plan: SparsityPlan | None
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


def check(request: Request) -> ResolvedRequest:
    """Open what a request names and check everything about it, cheapest first; nothing is measured yet."""
    arithmetic = request.plan is None and request.allocator != AUTO
    allocators = [request.allocator] if arithmetic else []
    criterion_options, given = split_options(
        request.options, request.criterion, allocators, Request.__dataclass_fields__
    )
    allocator_options = configure(request.allocator, given) if arithmetic else {}
    raced = request.plan is None and is_raced(request.allocator, allocator_options)
    plan = load_plan(request.plan) if isinstance(request.plan, str | Path) else request.plan
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
    needs, gradients = (
        CRITERIA.needs(request.criterion, criterion_options),
        _given_gradients(request, criterion_options),
    )
    needs_text = any(gradients is None or name not in GRADIENTS for name in needs) or any(
        fact(name).needs_text for name in needed
    )
    needs_text = needs_text or raced or request.refine != "none"
    request, packed = _beside(request)
    who = f"Pruning with {request.criterion} and {request.allocator}"
    streamed = request.output is not None and not _in_memory(raced, needed)
    opened = open_request(request, needs_text, who, streamed=streamed)
    asked = identity(request, opened, {**allocator_options, **criterion_options}, plan, table)
    if gradients is not None:
        gradients.check(
            gradient_of(request, criterion_options), {layer.name: layer.shape for layer in opened.layers}, opened.facts
        )
    continued, done = _partial_plan(request, opened, asked)
    return ResolvedRequest(
        request,
        opened,
        criterion_options,
        allocator_options,
        continued or plan,
        table,
        needed,
        gradients,
        asked,
        packed,
        done,
    )


def _in_memory(raced: bool, needed: Sequence[str]) -> bool:
    return raced or any(fact(name).reads == "trial" for name in needed)


def _columns(request: Request, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns of the table that the request's allocator reads."""
    return (
        automatic.needs(request.criterion)
        if request.allocator == AUTO
        else ALLOCATORS.needs(request.allocator, options)
    )


def _beside(request: Request) -> tuple[Request, Path | None]:
    """For a run whose result is packed: the request with a place beside the output instead, and the output; else as it
    is."""
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


def _partial_plan(request: Request, opened: Opened, asked: Mapping[str, Any]) -> tuple[SparsityPlan | None, int]:
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
    compare(state.identity, asked, partial_folder(output))
    return SparsityPlan.from_json(state.plan, str(partial_folder(output))), state.done


def _given_gradients(request: Request, options: Mapping[str, Any]) -> Gradients | None:
    if request.gradients is None:
        return None
    if not gradient_of(request, options):
        raise BillhookError(
            f"The criterion {request.criterion} reads no gradients: leave --gradients out, or take criterion gblm."
        )
    return request.gradients if isinstance(request.gradients, Gradients) else open_gradients(Path(request.gradients))
