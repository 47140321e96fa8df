"""How much of the model's KL divergence is due to each layer when all layers lose the same: the column `loss_share`.

The model is pruned to `MIDDLE` everywhere, block by block as `billhook prune` does, and one backward pass of the
divergence from the dense model's predictions gives each layer's share (`billhook.trials.attribution`). The criterion
sees all windows but the last `WINDOWS` (at most half of them), on which the divergence is measured. A copy of the
weights is in memory meanwhile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import in_batches
from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators.curves import MIDDLE
from billhook.plan.metrics import fact
from billhook.plan.plan import Pattern, SparsityPlan
from billhook.registry import method
from billhook.trials.trials import Setting, TrialRunner

WINDOWS = 16


@method(paper=fact("loss_share").paper)
def loss_share(
    model: PreTrainedModel, layers: Sequence[Layer], batches: Sequence[Tensor], *, criterion: str = "admm"
) -> dict[str, float]:
    """The shares by layer name, in nats a token; the model's weights are restored.

    `batches` are token ids [batch, length] int64. Raises BillhookError for fewer than two windows.
    """
    ids = torch.cat(list(batches))
    if len(ids) < 2:
        raise BillhookError(
            "The metric loss_share needs two windows of text or more: give more --samples, or a smaller --length."
        )
    last = min(WINDOWS, len(ids) // 2)
    plan = SparsityPlan(MIDDLE, Pattern.parse("unstructured"), {layer.name: MIDDLE for layer in layers}, {})
    setting = Setting(criterion, CRITERIA.configure(criterion, cheaper(criterion, layers)))
    with TrialRunner(model, layers, in_batches(ids[:-last], len(batches[0])), ids[-last:], setting) as runner:
        runner.prune(plan)
        return runner.attribute()
