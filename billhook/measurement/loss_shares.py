"""The column `loss_share`: each layer's part of the KL divergence when all layers are pruned to the same sparsity.

The model is pruned to `MIDDLE` everywhere, block by block as `billhook prune` does, and one backward pass of the
divergence from the dense model's predictions gives each layer's share (`billhook.trials.attribution`). The divergence
is measured on the last `WINDOWS` windows (at most half); the others calibrate. Memory: a second copy of the weights.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import rows_per_batch
from billhook.engine.batch import Batch, join_rows, rows_of, select_rows, split_rows
from billhook.engine.loop import Method
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators.curves import MIDDLE
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.registry import method
from billhook.tasks.opening import task_of
from billhook.trials.trials import TrialRunner

WINDOWS = 16


@method(paper=fact("loss_share").paper)
def loss_share(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    resources: Resources = IN_MEMORY,
    *,
    criterion: str = "admm",
) -> dict[str, float]:
    """Shares by layer name, in nats per token; the weights, which must all be in memory, are restored.

    Raises BillhookError for fewer than two rows of samples.
    """
    assert not resources.streamed
    samples = join_rows(batches)
    rows = rows_of(samples)
    if rows < 2:
        raise BillhookError(
            "The metric loss_share needs two windows of text: use more --samples or a smaller --length."
        )
    last = min(WINDOWS, rows // 2)
    plan = Plan.of_sparsities(MIDDLE, Pattern(), {layer.name: MIDDLE for layer in layers})
    method = Method(criterion, CRITERIA.configure(criterion, cheaper(criterion, layers)))
    size = rows_per_batch(rows - last, rows_of(batches[0]))
    given, heldout = select_rows(samples, slice(0, rows - last)), select_rows(samples, slice(rows - last, rows))
    with TrialRunner(model, task_of(model), layers, split_rows(given, size), heldout, method) as runner:
        runner.prune(plan)
        return runner.attribute()
