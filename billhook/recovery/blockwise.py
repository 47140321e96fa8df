"""Block tuning: adjust the kept weights of a pruned block so that the model's later outputs come closer to the dense
ones.

`--refine blocks` tunes the kept weights, `blocks+norms` also norms and biases, after any criterion. Yang et al.,
"Wanda++", 2025, arXiv:2503.04992, and Guo et al., "EBFT", 2024, arXiv:2402.12419, tune blocks by the error of their own
outputs. Here an error counts by what the next block makes of it:

    minimize  |G(F_θ(X)) − G(Y)|² / |G(Y)|²   over θ, zeros fixed,   Y = (1 − t) · F(X) + t · F(X')
    last block:  KL(P(Y) ‖ P(F_θ(X)))         for models that predict tokens; |F_θ(X) − Y|² / |Y|² for others

F is the dense block, F_θ the pruned one, G the next block, dense (the identity at the end of a stage), and P the final
norm, head and softmax. X are the block's inputs in the pruned model, X' those of the same tokens in the dense model,
and t is `dense_target` (0.5).

Adam for 20 epochs of minibatches of 4 windows; the step is 0.05 times the root mean square of each parameter and falls
to zero as a cosine. Every eighth window is held out: the weights of the epoch with the smallest loss there are kept,
and four epochs without improvement end the tuning. Where no epoch improves on the start, as with short windows, whose
gradients are noisy, a fifth of the step is tried, and then a fifth of that. If the loss, in the model's own dtype, is
not below the first, the block gets back the weights it had. With fewer than 8 windows nothing is tuned, which is noted.

Differences from the papers: the loss is that of the next block, targets are between the dense block's and the dense
model's outputs, and held-out windows decide. An interrupted run continues with the same bytes.

Cost: in memory one block six times in float32, the next one once, what a pass of four windows through both leaves for
the backward pass, inputs and targets, and, unless `dense_target` is 0, the dense model's outputs.

Limits: it does not look past the next block; with fewer than a few thousand tokens it fits the text, not the block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import world
from billhook.engine.batch import Batch
from billhook.engine.capture import single_row_calls
from billhook.engine.replay import run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.restore import differentiable, exchanged
from billhook.engine.walk import Block
from billhook.errors import BillhookError, JobError
from billhook.recovery.block_data import STEP, Data, Piece, minibatches, split_windows
from billhook.recovery.masked_adam import MaskedAdam
from billhook.recovery.trained import Kept, Trained, give_, values_of

Refining = Literal["none", "blocks", "blocks+norms"]
Masked = list[tuple[nn.Parameter, Tensor]]  # parameters and masks, True where they are tuned
LEAST = 8  # windows
PATIENCE = 4  # epochs
_STEPS = 1.0, 0.2, 0.04  # of the rate, tried until one improves the block
_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Refine:
    """Options of the tuning; `tune_norms_and_biases` also tunes the parameters of one dimension.

    Raises BillhookError for values out of range.
    """

    epochs: int = 20
    rate: float = 0.05
    dense_target: float = 0.5
    tune_norms_and_biases: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.rate < math.inf or not 0 <= self.dense_target <= 1:
            raise BillhookError(
                f"refine: epochs={self.epochs} must be at least 1, rate={self.rate:g} above 0 and "
                f"dense_target={self.dense_target:g} in [0, 1]."
            )

    @classmethod
    def asked(cls, refining: str, seed: int) -> "Refine | None":
        """The options of a request's `refine`; None for `none`."""
        return None if refining == "none" else cls(tune_norms_and_biases=refining == "blocks+norms", seed=seed)


@dataclass(frozen=True)
class Refined:
    """The held-out loss before and after (equal if the block got its old weights back), and the number of epochs."""

    before: float
    after: float
    epochs: int


class BlockTuner:
    """Tunes the blocks of a walk in order: `note(block)` while a block is still dense, `tune_(block)` once pruned.

    `batches` are those of the walk. Raises BillhookError in a run of several processes.
    """

    def __init__(
        self, options: Refine, model: PreTrainedModel, batches: Sequence[Batch], resources: Resources = IN_MEMORY
    ) -> None:
        if world() > 1:
            raise BillhookError("--refine works in one process only: run without torchrun, or leave --refine out.")
        self.options, self.resources = options, resources
        self.wants_dense_outputs = options.dense_target > 0
        self._single = single_row_calls(model, batches)
        self._targets = resources.activations()

    @torch.no_grad()
    def note(self, block: Block) -> None:
        """Store the outputs of the block, which is still dense, for its current inputs."""
        self._targets = self.resources.activations()
        for inputs, call in zip(block.inputs, block.calls, strict=True):
            self._targets.append(run_block(block.module, inputs, call))

    @torch.no_grad()
    def tune_(self, block: Block) -> str:
        """Tune the block in place and return a note; with fewer than `LEAST` windows it is not changed."""
        if self.options.dense_target > 0:
            for index, whole in enumerate(block.dense):
                self._targets[index] = torch.lerp(self._targets[index], whole, self.options.dense_target)
        if block.following.module is not None:
            given, self._targets = self._targets.take(), self.resources.activations()  # the shape may change
            for states, call in zip(given, block.following.calls, strict=True):
                self._targets.append(run_block(block.following.module, states, call))
        windows = sum(len(h) for h in self._targets)
        if windows and self._targets[0].ndim == 2:
            return f"block {block.index} is not refined: its hidden states are one list of patches for all images"
        if windows < LEAST:
            return f"block {block.index} is not refined: {windows} calibration windows are fewer than {LEAST}"
        single = [calls[block.index : block.index + 2] for calls in self._single]
        data = Data(block.inputs, self._targets, block.calls, single, block.following)
        done = refine_block_(block.module, data, self.tuned(block), self.options, block.index)
        change = f"loss {done.before:.4g} -> {done.after:.4g} on held-out windows after {done.epochs} epochs"
        return f"block {block.index} refined: {change}"

    def tuned(self, block: Block) -> Sequence[Trained]:
        """What is tuned of a block."""
        return kept_in(block.module, block.layers, self.options.tune_norms_and_biases)


def kept_in(module: nn.Module, layers: Sequence[Layer], tune_norms_and_biases: bool) -> list[Trained]:
    """The same as `tunable`, with rates as shares of the root mean square of the whole parameter."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [
        Kept(names[id(p)], p, p.dtype, mask, float(p.detach().float().square().mean().sqrt()))
        for p, mask in tunable(module, layers, tune_norms_and_biases)
    ]


def tunable(module: nn.Module, layers: Sequence[Layer], tune_norms_and_biases: bool) -> Masked:
    """The kept weights of `layers` and, with `tune_norms_and_biases`, all parameters of one dimension of a block."""
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in layers:
        if isinstance(p := layer.stored, nn.Parameter):
            mask = found.setdefault(id(p), (p, torch.zeros_like(p, dtype=torch.bool)))[1]
            layer.view(mask).copy_(layer.weight != 0)
    vectors = [p for p in module.parameters() if tune_norms_and_biases and p.ndim == 1]
    found |= {id(p): (p, torch.ones_like(p, dtype=torch.bool)) for p in vectors}
    return list(found.values())


def refine_block_(module: nn.Module, data: Data, tuned: Sequence[Trained], options: Refine, index: int = 0) -> Refined:
    """Tune parameters of the block in place; raises JobError when the initial loss is not finite.

    Deterministic for equal data and seed. The block is float32 during the tuning; the final comparison is made in its
    own dtype, with the numbers as they are stored.
    """
    train, held = split_windows([len(h) for h in data.targets])
    before = _mean_loss(module, data, held)
    if not math.isfinite(before):
        raise JobError("The outputs of a block are not finite: use another --dtype, or leave --refine out.")
    start = values_of(tuned)
    following = data.following.module or nn.Identity()
    parameters, others = [t.parameter for t in tuned], [*module.parameters(), *following.parameters()]
    with _in_float32(module), _in_float32(following), differentiable(parameters, others):
        epochs = 0
        for part in _STEPS:
            slower = replace(options, rate=options.rate * part)
            best, improved, more = _descend(module, data, tuned, (train, held), slower, index)
            epochs += more
            if improved:
                break
            give_(tuned, start)
    give_(tuned, {t.name: best[t.name].to(t.stored) for t in tuned})
    after = _mean_loss(module, data, held)
    if after < before:
        return Refined(before, after, epochs)
    give_(tuned, start)
    return Refined(before, before, epochs)


def _descend(
    module: nn.Module,
    data: Data,
    tuned: Sequence[Trained],
    split: tuple[list[Piece], list[Piece]],
    options: Refine,
    index: int,
) -> tuple[Mapping[str, Tensor], bool, int]:
    """Adam with early stopping; the values with the lowest held-out loss, whether they are not the first ones, and the
    number of epochs."""
    train, held = split
    random = torch.Generator().manual_seed(1000 * options.seed + index)
    adam = MaskedAdam(tuned, betas=_BETAS, clip=math.inf)
    best, least, bad, improved = adam.values(), _mean_loss(module, data, held), 0, False
    # without a scale, the gradient of a single token underflows in a float16 head
    scale = 2.0 ** math.ceil(math.log2(STEP * max(h.shape[1] for h in data.inputs)))
    steps, step = options.epochs * len(minibatches(train, torch.Generator())), 0
    for epoch in range(1, options.epochs + 1):  # noqa: B007
        for pieces in minibatches(train, random):
            windows = sum(len(rows) for _, rows in pieces)
            with torch.enable_grad():
                losses = [data.loss(module, piece) * (len(piece[1]) / windows) for piece in pieces]
                (torch.stack(losses).sum() * scale).backward(inputs=[t.parameter for t in tuned])
            adam.step(options.rate * (1 + math.cos(math.pi * step / steps)) / 2, scale)
            step += 1
        loss = _mean_loss(module, data, held)
        bad = 0 if loss < least else bad + 1
        if loss < least:
            best, least, improved = adam.values(), loss, True
        if bad == PATIENCE:
            break
    adam.close()
    return best, improved, epoch


@torch.no_grad()
def _mean_loss(module: nn.Module, data: Data, pieces: Sequence[Piece]) -> float:
    """The mean loss over windows, computed one at a time."""
    losses = [float(data.loss(module, (batch, [row]))) for batch, rows in pieces for row in rows]
    return math.fsum(losses) / len(losses)


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """Convert the parameters of a module to float32, and restore their own values and dtype afterwards."""
    narrow = [p for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32]
    with exchanged([(p, p.data.float()) for p in narrow]):
        yield
