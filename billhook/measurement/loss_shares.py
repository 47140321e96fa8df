"""Loss shares: how much of the model's divergence is due to each layer when all layers are pruned alike.

    loss_share:CRITERION = ½ ⟨∂D/∂V_l, V_l − W_l⟩

D is the divergence of the model's predictions from the dense model's after every layer was pruned to 60 % with the
criterion, block by block as in `billhook prune`; V_l and W_l are the pruned and dense weights of layer l. One backward
pass gives all shares. D is zero and smallest at the dense weights; where it is quadratic, the shares add up to it
(Euler's theorem), and each contains half of what the layer's error costs together with those of other layers. On our
models they add up to 1.1 to 1.3 times D. It is read by `curves`.

Cost: one pruning of the model in memory and a second copy of its weights. The criterion sees all calibration windows
but the last 16 (at most half), which are scored.
"""

from collections.abc import Sequence

from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import rows_per_batch
from billhook.engine.batch import Batch, join_rows, rows_of, select_rows, split_rows
from billhook.engine.method import Method
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.errors import BillhookError
from billhook.measurement.error_curves import cheaper
from billhook.methods.sparse import CRITERIA
from billhook.plan.allocators.curves import MIDDLE
from billhook.plan.metrics import fact
from billhook.plan.plan import Plan
from billhook.plan.spec import Pattern
from billhook.registry import method
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
    with TrialRunner(model, layers, split_rows(given, size), heldout, method) as runner:
        runner.prune(plan)
        return runner.attribute()
