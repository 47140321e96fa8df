"""Walk a model block by block; the inputs of each block are what the current weights of the earlier blocks produce.

    for block in walk(model, batches, statistics): ...

In the loop body, `block.stats` holds the statistics of the inputs of each layer. Changes that the body makes to the
block's weights change the inputs of the next block. Blocks run on stored hidden states with the arguments with which
the model calls them, and between stacks the model's own code runs (`billhook.engine.flow`): masks and rotary tables
differ between blocks in Gemma 2/3 and GPT-OSS, and a vision tower's outputs are embedded among tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.ambient import evaluating
from billhook.architectures.layers import Layer, find_layers, observable_experts
from billhook.architectures.stacks import blocks_of
from billhook.distributed.collectives import shard
from billhook.engine.activation_store import ActivationStore
from billhook.engine.batch import Batch, as_batches, rows_of
from billhook.engine.capture import not_run, predictor, predicts_tokens
from billhook.engine.dense_stream import DenseStream, Stage
from billhook.engine.flow import flow_of
from billhook.engine.observer import Observer
from billhook.engine.replay import Call
from billhook.engine.resources import IN_MEMORY, Resources
from billhook.errors import BillhookError, JobError
from billhook.methods.statistics import LayerStats

Stats = dict[str, LayerStats]  # by layer name
Progress = Callable[[str], None]  # called with the name of each finished layer


@dataclass(frozen=True)
class Following:
    """What follows a block: the next block with its calls, or, if `module` is None, the final norm and a head that
    predicts every token; an identity where it is anything else.

    `predict` returns the logits [rows, length, classes] for outputs of the last block [rows, length, width].
    """

    module: nn.Module | None
    calls: Sequence[Call]
    predict: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One block of the walk, with its layers, its inputs and the statistics of its layers' inputs.

    `inputs` are hidden states [rows, length, width], one tensor a batch, valid until the next block is yielded; `calls`
    are the other arguments of each call. Both are empty where the samples do not reach the block, such as a vision
    tower with text alone. `stages` are the layers in the order in which they should be pruned, with
    their statistics: all at once or, if `drift` is a statistic, group by group (`billhook.engine.dense_stream`);
    iterate over them exactly once. `stats` are the statistics of a block with a single stage. `stream` is the dense
    model's, if requested. `following` is in memory only while `resources.block(index + 1)` is entered. `last` says that
    no other block follows.
    """

    index: int
    name: str
    module: nn.Module
    layers: list[Layer]
    inputs: Sequence[Tensor] | ActivationStore
    stats: Stats
    stages: Iterable[Stage]
    calls: Sequence[Call]
    stream: DenseStream | None
    following: Following
    last: bool

    def stats_of(self, layer: Layer) -> LayerStats:
        """The statistics of a layer of a read-only walk; raises BillhookError where the model does not run the
        block."""
        if layer.name not in self.stats:
            raise not_run(self.name)
        return self.stats[layer.name]

    @property
    def dense(self) -> Sequence[Tensor] | ActivationStore:
        """The outputs of the dense model's block, after the stages."""
        return () if self.stream is None else self.stream.hidden


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    batches: Tensor | Batch | Sequence[Tensor | Batch],
    statistics: Sequence[str] = (),
    *,
    layers: Sequence[Layer] | None = None,
    read_only: bool = False,
    dense_outputs: bool = False,
    start: int = 0,
    resources: Resources = IN_MEMORY,
) -> Iterator[Block]:
    """Yield every block in running order, from block `start` on.

    `batches` are mappings of keyword arguments (or token ids int64 [windows, length]) in the order in which statistics
    accumulate; they may be empty without statistics. `layers` are those of the walk (all prunable ones by default).
    `read_only` passes the outputs of each block as it is when it is yielded, which saves the second pass: the loop body
    changes no weight, or changes only those of a model whose dense outputs are passed on. `dense_outputs` requests the
    outputs of the dense model's blocks. Raises JobError, naming the block or layer, when activations are not finite;
    BillhookError for `drift` or `dense_outputs` with `start` inside a model that is entirely in memory.
    """
    checked = shard(as_batches(model, batches))
    with observable_experts(model), evaluating(model):
        found = find_layers(model) if layers is None else layers
        yield from _Walk(model, checked, resources, found).run(statistics, read_only, dense_outputs, start)


class _Walk:
    """The state of a walk: the inputs of the current block, and the calls of all blocks."""

    def __init__(
        self, model: PreTrainedModel, batches: Sequence[Batch], resources: Resources, layers: Sequence[Layer]
    ) -> None:
        self.resources = resources
        self.blocks = blocks_of(model)
        self.modules = list(self.blocks.values())
        self.rows = sum(map(rows_of, batches))
        self.flow = flow_of(model, self.blocks, batches, resources.activations)
        self.predict = predictor(model, self.blocks, self.flow.form)
        self.predicts_tokens = predicts_tokens(model)
        self.layers: dict[int, list[Layer]] = {}
        for layer in layers:
            self.layers.setdefault(layer.block, []).append(layer)

    @property
    def hidden(self) -> ActivationStore:
        """The inputs of the current block."""
        return self.flow.hidden

    def run(self, statistics: Sequence[str], read_only: bool, dense_outputs: bool, start: int) -> Iterator[Block]:
        """See `walk`."""
        drift = "drift" in statistics and not read_only
        dense = DenseStream(self.flow) if drift or dense_outputs else None
        if dense is not None and start and not self.resources.streamed:
            gone = "This model is partly pruned and its dense weights are not in memory"
            raise BillhookError(f"{gone}: use dense_target=0, or start from a model directory.")
        for index, (name, module) in enumerate(self.blocks.items()):
            if index < start and not self.flow.batches:
                continue
            if dense is not None and index < start:
                with self.resources.block(index, source=True):
                    dense.advance(module, index)
            with self.resources.block(index, ahead=index + 1):
                outputs = self.hidden
                if index >= start:
                    stats: Stats = {}
                    if not drift and (statistics or read_only) and self.flow.calls(index):
                        outputs, stats = self._observe(index, statistics, read_only)
                    yield self._block(index, stats, dense, statistics if drift else ())
                if index + 1 < len(self.blocks):
                    self._advance(index, outputs)
                    check_finite_states(self.hidden, name)
                    for flow in (self.flow,) if dense is None else (self.flow, dense.flow):
                        flow.cross(index + 1)

    def _block(self, index: int, stats: Stats, dense: DenseStream | None, staged: Sequence[str]) -> Block:
        """The block to yield; `staged` are the statistics that are collected stage by stage."""
        name, module = list(self.blocks)[index], self.modules[index]
        calls, layers = self.flow.calls(index), self.layers.get(index, [])
        stages: Iterable[Stage] = [(layers, stats)]
        if dense is not None and staged:
            stages = dense.stages(module, index, layers, staged, self.flow)
        elif dense is not None:
            dense.advance(module, index)
        last = index + 1 == len(self.blocks)
        inputs = self.hidden if calls else ()
        return Block(
            index, name, module, layers, inputs, stats, stages, calls, dense, self._following(index), last
        )  # fmt: skip

    def _following(self, index: int) -> Following:
        calls = self.flow.following(index)
        if calls is not None:
            return Following(self.modules[index + 1], calls, self.predict)
        if index + 1 == len(self.blocks) and self.predicts_tokens:
            return Following(None, (), self.predict)
        return Following(nn.Identity(), [Call((), {}) for _ in self.flow.batches], self.predict)

    def _observe(self, index: int, statistics: Sequence[str], read_only: bool) -> tuple[ActivationStore, Stats]:
        """Run a block on its inputs; return its outputs (read-only walk) or inputs, and the statistics."""
        observer = Observer(self.layers.get(index, []) if statistics else [], statistics, read_only, self.rows)
        outputs = self.resources.activations() if read_only else self.hidden
        for batch, call in enumerate(self.flow.calls(index)):
            with observer:
                output = self.flow.run(batch, self.modules[index], call)
                if read_only:
                    outputs.append(output)
        return outputs, observer.stats()

    def _advance(self, index: int, outputs: ActivationStore) -> None:
        """Replace the hidden states by the outputs of the block, which are `outputs` if these are not its inputs."""
        if outputs is not self.hidden:
            self.flow.hidden = outputs
        else:
            self.flow.advance(self.modules[index], index)


def check_finite_states(hidden: Iterable[Tensor], name: str) -> None:
    """Raise JobError naming the block when its outputs are not finite."""
    if not all(bool(torch.isfinite(states.sum(dtype=torch.float64))) for states in hidden):
        raise JobError(f"The output of {name} holds NaN or infinity: use --dtype float32, or check the weights.")
