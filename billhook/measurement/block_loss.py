"""Block loss: how much the loss rises when one block alone is pruned.

    block_loss:S = (loss with only this block pruned by magnitude to S − dense loss) / dense loss

Each block in turn is pruned (whole layers are compared), the loss on the calibration text is measured, and the weights
are restored bit for bit. It costs one evaluation of the text per block and one of the dense model. It is read by
`sensitivity`.

Limits: it does not know how blocks that are pruned together interact.
"""

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.layers import Layer
from billhook.engine.batch import Batch, join_rows, split_rows
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.restore import restored
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.predicting import mean_loss, rows_at_once
from billhook.methods.masks import Select
from billhook.methods.sparse.magnitude import magnitude
from billhook.methods.statistics import LayerStats
from billhook.plan.metrics import fact
from billhook.registry import method
from billhook.tasks.opening import task_of


@method(paper=fact("block_loss").paper)
def block_loss(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    resources: Resources = IN_MEMORY,
    *,
    sparsity: float = 0.6,
) -> dict[str, float]:
    """(loss with only this block pruned to `sparsity` - dense loss) / dense loss, by layer name.

    The loss is the mean negative log-likelihood. All `layers` of a block get its number. All weights are restored.
    """
    if not 0 < sparsity < 1:
        raise BillhookError(f"block_loss:{sparsity:g}: the sparsity must lie between 0 and 1, such as block_loss:0.6.")
    samples, scoring = join_rows(batches), task_of(model)

    def measured() -> float:
        if scoring.unit == "token":
            return evaluate(model, samples, scoring=scoring).nll
        with evaluating(model):
            return mean_loss(model, split_rows(samples, rows_at_once(model, samples)), scoring)

    dense = measured()
    if math.isnan(dense):
        raise BillhookError("The metric block_loss needs labels: name the folders of the images after their classes.")
    losses: dict[str, float] = {}
    for block in sorted({layer.block for layer in layers}):
        inside = [layer for layer in layers if layer.block == block]
        with resources.block(block), restored(inside):
            for layer in inside:
                select = Select(layer.shape, sparsity, round(sparsity * layer.weight.numel()), None, "layer", "exact")
                layer.weight.copy_(magnitude(layer.weight.float(), LayerStats(0, 0), select))
            loss = measured()
        losses |= {layer.name: (loss - dense) / dense for layer in inside}
    return losses
