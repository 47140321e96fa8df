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
and four epochs without improvement end the tuning. If that loss, in the model's own dtype, is not below the first, the
block gets back the weights it had. With fewer than 8 windows nothing is tuned, which is noted.

Differences from the papers: the loss is that of the next block, targets are between the dense block's and the dense
model's outputs, and held-out windows decide. An interrupted run continues with the same bytes.
Cost: in memory one block six times in float32, the next one once, what a pass of four windows through both leaves for
the backward pass, inputs and targets, and, unless `dense_target` is 0, the dense model's outputs.

Limits: it does not look past the next block; with fewer than a few thousand tokens it fits the text, not the block.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from billhook.architectures.layers import Layer
from billhook.distributed.collectives import world
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch
from billhook.engine.capture import Shape, single_row_calls
from billhook.engine.replay import Call, run_block
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.engine.restore import differentiable, exchanged
from billhook.engine.walk import Block, Following
from billhook.errors import BillhookError, JobError
from billhook.evaluation.kl import token_kl

Refining = Literal["none", "blocks", "blocks+norms"]
Piece = tuple[int, list[int]]  # a batch, and windows of it
Tuned = Sequence[tuple[nn.Parameter, Tensor]]  # parameters and masks, True where they are tuned
HELD_OUT = 8  # one window in eight
LEAST = 8  # windows
PATIENCE = 4  # epochs
_WINDOWS = 4  # windows in a step
PREDICTED = 512  # tokens whose logits are in memory at once


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
        own, after = self._single[block.index], {} if block.last else self._single[block.index + 1]
        single = {shape: [call, after.get(shape, call)] for shape, call in own.items()}
        data = Data(block.inputs, self._targets, block.calls, single, block.following)
        tuned = tunable(block.module, block.layers, self.options.tune_norms_and_biases)
        done = refine_block_(block.module, data, tuned, self.options, block.index)
        change = f"loss {done.before:.4g} -> {done.after:.4g} on held-out windows after {done.epochs} epochs"
        return f"block {block.index} refined: {change}"


@dataclass(frozen=True)
class Data:
    """Inputs and targets of a block, each [windows, tokens, width] a batch, with the call of each batch.

    Targets are outputs of the next block or, for the last block, of the block itself. `single` are, by the shape of a
    window's hidden states, the calls of the block and of the next one for a single window.
    """

    inputs: Sequence[Tensor] | ActivationStore
    targets: Sequence[Tensor] | ActivationStore
    calls: Sequence[Call]
    single: Mapping[Shape, Sequence[Call]]
    following: Following

    def loss(self, module: nn.Module, piece: Piece) -> Tensor:
        """The loss of some windows of a batch after what follows the block, float32."""
        batch, rows = piece
        index = torch.tensor(rows)
        inputs, targets = (h[batch][index].to(next(module.parameters()).dtype) for h in (self.inputs, self.targets))
        single = self.single[tuple(inputs.shape[1:])]
        outputs = run_block(module, inputs, self.calls[batch].part(index, single[0], inputs.dtype))
        if self.following.module is None:
            return _mean_kl(outputs, targets, self.following.predict)
        call = self.following.calls[batch]
        call = call.part(index, single[1], inputs.dtype) if call.args or call.kwargs else call
        outputs = run_block(self.following.module, outputs, call)
        outputs, targets = outputs.float(), targets.float()
        return (outputs - targets).square().sum() / targets.square().sum().clamp_min(1e-30)


def _mean_kl(outputs: Tensor, targets: Tensor, predict: Callable[[Tensor], Tensor]) -> Tensor:
    """The KL divergence of the predictions for `outputs` from those for `targets`, nats a token, float32.

    Both are [windows, tokens, width]. The logits of only `PREDICTED` tokens are in memory at a time.
    """

    def part(ours: Tensor, theirs: Tensor) -> Tensor:
        return token_kl(predict(ours), predict(theirs)).sum()

    tokens = max(1, PREDICTED // len(outputs))
    pairs = zip(outputs.split(tokens, 1), targets.split(tokens, 1), strict=True)
    parts = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum() / outputs[..., 0].numel()


def tunable(module: nn.Module, layers: Sequence[Layer], tune_norms_and_biases: bool) -> Tuned:
    """The kept weights of `layers` and, with `tune_norms_and_biases`, all parameters of one dimension of a block."""
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for layer in layers:
        if isinstance(p := layer.stored, nn.Parameter):
            mask = found.setdefault(id(p), (p, torch.zeros_like(p, dtype=torch.bool)))[1]
            layer.view(mask).copy_(layer.weight != 0)
    vectors = [p for p in module.parameters() if tune_norms_and_biases and p.ndim == 1]
    found |= {id(p): (p, torch.ones_like(p, dtype=torch.bool)) for p in vectors}
    return list(found.values())


def refine_block_(module: nn.Module, data: Data, tuned: Tuned, options: Refine, index: int = 0) -> Refined:
    """Tune parameters of the block in place; raises JobError when the initial loss is not finite.

    Deterministic for equal data and seed. The block is float32 during the tuning; the final comparison is made in its
    own dtype.
    """
    train, held = _split([len(h) for h in data.targets])
    before = _mean_loss(module, data, held)
    if not math.isfinite(before):
        raise JobError("The outputs of a block are not finite: use another --dtype, or leave --refine out.")
    parameters = [p for p, _ in tuned]
    old = [p.detach().clone() for p in parameters]
    following = data.following.module or nn.Identity()
    with _in_float32(module), _in_float32(following), differentiable([], following.parameters()):
        best, epochs = _descend(module, data, tuned, (train, held), options, index)
    for p, value in zip(parameters, best, strict=True):
        p.data.copy_(value)
    after = _mean_loss(module, data, held)
    if after < before:
        return Refined(before, after, epochs)
    for p, value in zip(parameters, old, strict=True):
        p.data.copy_(value)
    return Refined(before, before, epochs)


def _descend(
    module: nn.Module, data: Data, tuned: Tuned, split: tuple[list[Piece], list[Piece]], options: Refine, index: int
) -> tuple[list[Tensor], int]:
    """Adam with early stopping; the values with the lowest held-out loss, and the number of epochs."""
    train, held = split
    random = torch.Generator().manual_seed(1000 * options.seed + index)
    parameters = [p for p, _ in tuned]
    best, least, bad = [p.detach().clone() for p in parameters], _mean_loss(module, data, held), 0
    rates = [options.rate * float(p.detach().square().mean().sqrt()) for p in parameters]
    adam = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)])
    # without a scale, the gradient of a single token underflows in a float16 head
    scale = 2.0 ** math.ceil(math.log2(_WINDOWS * max(shape[0] for shape in data.single)))
    steps, step = options.epochs * len(_minibatches(train, torch.Generator())), 0
    for epoch in range(1, options.epochs + 1):  # noqa: B007
        for pieces in _minibatches(train, random):
            for group, rate in zip(adam.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            step += 1
            adam.zero_grad()
            windows = sum(len(rows) for _, rows in pieces)
            with torch.enable_grad(), differentiable(parameters, module.parameters()):
                losses = [data.loss(module, piece) * (len(piece[1]) / windows) for piece in pieces]
                gradients = torch.autograd.grad(torch.stack(losses).sum() * scale, parameters, allow_unused=True)
            for (p, mask), gradient in zip(tuned, gradients, strict=True):
                p.grad = None if gradient is None else gradient.mul_(mask).div_(scale)
            del gradients
            adam.step()
        loss = _mean_loss(module, data, held)
        bad = 0 if loss < least else bad + 1
        if loss < least:
            best, least = [p.detach().clone() for p in parameters], loss
        if bad == PATIENCE:
            break
    adam.zero_grad()
    return best, epoch


def _split(sizes: Sequence[int]) -> tuple[list[Piece], list[Piece]]:
    """The windows for training and the held-out windows, every eighth."""
    numbers = [(b, r) for b, size in enumerate(sizes) for r in range(size)]
    parts: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for number, (b, r) in enumerate(numbers):
        parts[number % HELD_OUT == HELD_OUT // 2].setdefault(b, []).append(r)
    train, held = (list(part.items()) for part in parts)
    return train, held


def _minibatches(train: Sequence[Piece], random: torch.Generator) -> list[list[Piece]]:
    """All windows in random order, in steps of `_WINDOWS` or a few more."""
    pieces = []
    for number in torch.randperm(len(train), generator=random).tolist():
        batch, rows = train[number]
        order = [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
        pieces += [(batch, order[i : i + _WINDOWS]) for i in range(0, len(order), _WINDOWS)]
    steps: list[list[Piece]] = [[]]
    for piece in pieces:
        if sum(len(rows) for _, rows in steps[-1]) >= _WINDOWS:
            steps.append([])
        steps[-1].append(piece)
    return steps


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
