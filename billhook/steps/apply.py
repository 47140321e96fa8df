"""Apply a plan to a model in memory, or to one whose blocks are read one at a time."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from billhook.ambient import pinned
from billhook.architectures.layers import Layer, find_layers
from billhook.distributed.collectives import check_share
from billhook.engine.batch import Batch, as_batches
from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import LayerResult, apply_plan_
from billhook.engine.method import Group, Method, Prefix, Rounding
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.walk import Block, Progress
from billhook.errors import BillhookError
from billhook.methods.sparse import CRITERIA
from billhook.plan.plan import Plan
from billhook.recovery.blockwise import BlockTuner, Refine
from billhook.steps.gradients import make_gradients
from billhook.steps.request import Opened
from billhook.store.layout import GRADIENTS
from billhook.tasks.opening import task_of

Finished = Callable[[Block, list[LayerResult]], None]  # called with a pruned block and the results of its layers


def prune_with(
    opened: Opened,
    plan: Plan,
    method: Method,
    *,
    gradients: Gradients | None = None,
    refine: Refine | None = None,
    start: int = 0,
    progress: Progress = lambda layer: None,
    finished: Finished = lambda block, results: None,
) -> list[LayerResult]:
    """Prune an opened model in place by `plan`; the arguments are those of `prune_`."""
    plan.check({layer.name: layer.shape for layer in opened.layers})
    if method.observed or (method.gradient and gradients is None) or refine:
        if not opened.batches:
            who = "--refine" if refine else f"The criterion {method.criterion}"
            raise BillhookError(f"{who} needs activations: give text with --calibration SOURCE.")
        check_share(len(opened.batches))
    tuner = None if refine is None else BlockTuner(refine, opened.model, opened.batches, opened.resources)
    with _gradients(opened, method.gradient, gradients, progress) as read:
        return apply_plan_(
            opened.model, plan, method, opened.batches, layers=opened.layers, gradients=read, tuner=tuner,
            resources=opened.resources, start=start, progress=progress, finished=finished,
        )  # fmt: skip


@pinned
def prune_(
    model: PreTrainedModel,
    plan: Plan,
    *,
    criterion: str = "wanda",
    batches: Tensor | Batch | Sequence[Tensor | Batch] = (),
    layers: Sequence[Layer] | None = None,
    group: Group | None = None,
    rounding: Rounding = "exact",
    prefix: Prefix = "pruned",
    gradients: Gradients | None = None,
    refine: Refine | None = None,
    resources: Resources = IN_MEMORY,
    start: int = 0,
    progress: Progress = lambda layer: None,
    finished: Finished = lambda block, results: None,
    **options: Any,
) -> list[LayerResult]:
    """Prune a model in memory in place by `plan`.

    * `batches`: token ids int64 [windows, length] or mappings of keyword arguments, one or several; every criterion
      except magnitude needs them.
    * `layers`: the layers of the plan, by default all prunable ones.
    * `group`: replaces the criterion's comparison group.
    * `prefix`: whose outputs are the inputs of the next block, the pruned block's or the dense one's.
    * `gradients`: of the dense model, for a criterion that reads them; computed first if not given.
    * `refine`: tunes the remaining weights of each block once it is pruned.
    * `start`: the first block to prune; earlier blocks are pruned already.
    * `finished`: called after each block.
    * `options`: of the criterion.

    Raises BillhookError, before anything changes, for a plan, criterion, gradients or options that do not fit; JobError
    if the zeros are not those of the plan or activations are not finite.
    """
    method = Method(criterion, CRITERIA.configure(criterion, options), group, rounding, prefix)
    chosen = find_layers(model) if layers is None else list(layers)
    opened = Opened(None, model, task_of(model), resources, chosen, None, as_batches(model, batches))
    return prune_with(
        opened, plan, method, gradients=gradients, refine=refine, start=start, progress=progress, finished=finished
    )


@contextmanager
def _gradients(
    opened: Opened, statistic: str, given: Gradients | None, progress: Progress
) -> Iterator[Gradients | None]:
    """The `given` gradients, checked, or new ones in a temporary file; None for a criterion that reads none."""
    if not statistic:
        yield None
    elif given is not None:
        given.check(statistic, {layer.name: layer.shape for layer in opened.layers})
        yield given
    else:
        with tempfile.TemporaryDirectory(prefix="billhook.") as folder:
            yield make_gradients(opened, statistic, Path(folder) / GRADIENTS, progress)
