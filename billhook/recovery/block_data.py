"""The calibration windows of one block that is tuned: its inputs, the outputs that are wanted, and their loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from billhook.engine.activation_store import ActivationStore
from billhook.engine.replay import Call, run_block
from billhook.engine.walk import Following
from billhook.evaluation.kl import token_kl

Piece = tuple[int, list[int]]  # a batch, and windows of it
HELD_OUT = 8  # one window in eight
STEP = 4  # windows in a step
PREDICTED = 512  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Data:
    """Inputs and targets of a block, each [windows, tokens, width] a batch, with the call of each batch.

    Targets are outputs of the next block or, for the last block, of the block itself. `single` are, for each
    batch, the calls of the block and of the next one for a single window.
    """

    inputs: Sequence[Tensor] | ActivationStore
    targets: Sequence[Tensor] | ActivationStore
    calls: Sequence[Call]
    single: Sequence[Sequence[Call]]
    following: Following

    def loss(self, module: nn.Module, piece: Piece) -> Tensor:
        """The loss of some windows of a batch after what follows the block, float32."""
        batch, rows = piece
        index = torch.tensor(rows)
        inputs, targets = (h[batch][index].to(next(module.parameters()).dtype) for h in (self.inputs, self.targets))
        single = self.single[batch]
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


def split_windows(sizes: Sequence[int]) -> tuple[list[Piece], list[Piece]]:
    """The windows for training and the held-out windows, every eighth."""
    numbers = [(b, r) for b, size in enumerate(sizes) for r in range(size)]
    parts: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
    for number, (b, r) in enumerate(numbers):
        parts[number % HELD_OUT == HELD_OUT // 2].setdefault(b, []).append(r)
    train, held = (list(part.items()) for part in parts)
    return train, held


def minibatches(train: Sequence[Piece], random: torch.Generator) -> list[list[Piece]]:
    """All windows in random order, in steps of `STEP` or a few more."""
    pieces = []
    for number in torch.randperm(len(train), generator=random).tolist():
        batch, rows = train[number]
        order = [rows[i] for i in torch.randperm(len(rows), generator=random).tolist()]
        pieces += [(batch, order[i : i + STEP]) for i in range(0, len(order), STEP)]
    steps: list[list[Piece]] = [[]]
    for piece in pieces:
        if sum(len(rows) for _, rows in steps[-1]) >= STEP:
            steps.append([])
        steps[-1].append(piece)
    return steps
