"""Estimate peak memory and disk of a pruning job by a formula from the shapes of the model.

`billhook.steps.sample_run` measures the time on a part of the job.
"""

import math
import resource
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from billhook.architectures.config import classes_of, hidden_width
from billhook.architectures.layers import SHARED_INPUTS, Layer
from billhook.architectures.stacks import blocks_of
from billhook.distributed.collectives import world
from billhook.engine.batch import row_length, rows_of
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.evaluation.batching import TOKENS, batch_size
from billhook.evaluation.kl import K
from billhook.methods.statistics import GRADIENTS, REGIONAL
from billhook.steps.batch_size import TOKENS_A_BATCH
from billhook.steps.request import Opened
from billhook.steps.resolve import ResolvedRequest
from billhook.store.shards import weight_bytes

PROCESS = 0.5 * 2**30  # bytes of Python and its libraries
BACKWARD = 2**29  # most bytes of layer outputs in a backward pass, see billhook.trials.attribution
ROWS = 2**28  # bytes of the systems of rows that ADMM solves together


@dataclass(frozen=True)
class Estimate:
    """What a run needs; JSON has the fields that are known.

    * `memory_gib`: peak memory of one process, GiB.
    * `disk_gib`: size of the output, GiB.
    * `seconds` (number, optional): time of the work, where it was measured; not that of making the plan.
    * `measured` (string, optional): the part on which it was measured.
    """

    memory_gib: float
    disk_gib: float
    seconds: float | None = None
    measured: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def peak_bytes(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    criterion: str,
    needs: Collection[str],
    *,
    tokens: int = 0,
    batch_tokens: int = 0,
    length: int = 0,
    outside: int = 0,
    fisher: bool = False,
    resources: Resources = IN_MEMORY,
    racing: bool = False,
    refine: bool = False,
) -> float:
    """The peak memory of pruning `layers`, in bytes, without that of Python; `model` may be on the meta device.

    `needs` are the statistics and gradients to compute for the criterion; `tokens` and `batch_tokens` count the
    calibration tokens of one process, in total and in a batch, `length` those of a row (0: no predictions are made),
    and `outside` the weights of the largest embedding or head that is changed too. `fisher` says that
    gradients of the predictions were taken before, for the Fisher information. Observing inputs, changing a layer and
    predicting follow each other, so that the largest of the three counts. A `racing` allocator needs the whole
    model, its dense weights, and the dense model's predictions for half of the samples.
    """
    size, width = model.dtype.itemsize, hidden_width(model)
    each, counts = [n_bytes(block) for block in blocks_of(model).values()], [math.prod(x.shape) for x in layers]
    hidden, limit, columns = tokens * width * size, resources.spill_gib * 2**30, max(x.shape[1] for x in layers)
    kept = min(hidden, limit)  # of one store of hidden states
    total: float = n_bytes(model) - (sum(each) - max(each) if resources.streamed and not racing else 0)
    copies = 12 if criterion == "admm" else 5  # of a layer in float32; of an embedding there are four
    changing: float = max(copies * 4 * max(counts), 4 * 4 * outside)
    changing += ROWS if criterion == "admm" else 0
    observing = 0.0
    if needs or refine:  # hidden states, and the widest activations of a batch, in the model's dtype and in float32
        total += kept
        observing += (6 * size + 2 * 4) * batch_tokens * max(max(x.shape) for x in layers)
    squares = 2 if criterion == "gptq" else 4  # of the widest input, beside its statistics
    if "drift" in needs:  # the dense block and its hidden states; Gram matrix and drift of one input
        total += max(each) + kept
        observing, changing = observing + 2 * 4 * columns**2, changing + (1 + squares) * 4 * columns**2
    elif "gram" in needs:  # of every distinct input of a block
        inputs = [x for x in layers if x.kind.rpartition(".")[2] not in SHARED_INPUTS]
        grams = [sum(4 * x.shape[1] ** 2 for x in inputs if x.block == index) for index in {x.block for x in layers}]
        total, changing = total + max(grams), changing + (squares - 1) * 4 * columns**2
    total += max(observing, changing, predicting(model, length, fisher))
    if set(needs) & set(GRADIENTS):  # stored inputs, two lists that are not spilled, gradients and their float32 sums
        total += min((1 if REGIONAL in needs else len(each)) * hidden, limit) + 2 * hidden + max(each) * (1 + 4 / size)
    if refine:  # a block six times and the next one once, in float32; the targets and the dense model's outputs
        total += 7 * 4 * max(each) / size + 2 * kept
    if racing:  # weights and predictions of the dense model, logits of a batch, activations of its backward pass
        heldout, vocabulary = tokens // 2, classes_of(model)
        total += size * sum(counts) + heldout * 8 * min(K, vocabulary) + TOKENS_A_BATCH * vocabulary * (size + 8)
        total += 3 * min(size * min(heldout, TOKENS) * sum(x.shape[0] for x in layers), BACKWARD)
    return total


def predicting(model: PreTrainedModel, length: int, gradients: bool = False) -> int:
    """Bytes of logits of rows of `length` tokens: of those that are scored together, with as much computed of them, or,
    with `gradients`, of a row, with gradients three times as large, if that is more."""
    if not length:
        return 0
    row = length * classes_of(model) * model.dtype.itemsize
    together = batch_size(length, classes_of(model), model.dtype.itemsize)
    return max(2 * together, 4 * gradients) * row


def estimate(resolved: ResolvedRequest) -> Estimate:
    """Memory and disk of a checked request."""
    request, opened, method = resolved.request, resolved.opened, resolved.method
    model, refine = opened.model, request.refine != "none"
    needs = set(method.needs) - (set() if resolved.gradients is None else set(GRADIENTS))
    sizes = [rows_of(batch) * row_length(model, batch) for batch in opened.batches]
    tokens = sum(sizes) // world()
    memory = peak_bytes(
        model, opened.layers, request.criterion, needs, tokens=tokens, batch_tokens=max(sizes, default=0),
        length=scored_length(opened), resources=opened.resources, racing=resolved.on_trial, refine=refine,
    )  # fmt: skip
    hidden = tokens * hidden_width(model) * model.dtype.itemsize
    stores = (1 + ("drift" in needs) + 2 * refine) * bool(needs or refine)
    written = n_bytes(model) if opened.source is None else weight_bytes(opened.source)
    disk = written * (2 if resolved.packed else 1) + stores * max(0.0, hidden - request.spill_gib * 2**30)
    disk += 4 * sum(math.prod(x.shape) for x in opened.layers) * bool(needs & set(GRADIENTS))
    return Estimate(round((PROCESS + memory) / 2**30, 3), round(disk / 2**30, 3))


def scored_length(opened: Opened) -> int:
    """Tokens in a row of the text on which it is measured what was lost; 0 where it is not measured, and for images."""
    if not opened.batches or opened.task.unit != "token":
        return 0
    return row_length(opened.model, opened.batches[0])


def peak_gib() -> float:
    """The peak memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def n_bytes(module: nn.Module) -> int:
    """The bytes of all parameters of a module."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
