"""Whether stock `transformers` computes from the files that were written what the model in memory computes.

Both models run on one row of samples, and what each block adds to the hidden states is compared. The blocks of the
written model get the hidden states of the model in memory, so that rounding, which a damaged model amplifies from block
to block, is not taken for a difference. Half of the tokens must agree, because a token whose router hesitates may go to
another expert.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.ambient import same_random_numbers
from billhook.architectures.config import call_options, predictions
from billhook.architectures.stacks import blocks_of
from billhook.engine.batch import model_inputs, select_rows
from billhook.engine.capture import split_call
from billhook.engine.replay import states_of
from billhook.errors import JobError
from billhook.steps.request import Opened
from billhook.store.files import in_one_line

_TOLERANCE = {torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 0.25}  # relative, of what a token gets
_TOKENS = 256  # of a row of text; the hidden states of all blocks are in memory


@torch.no_grad()
def check_same_predictions(opened: Opened, written: PreTrainedModel, kept: Sequence[int]) -> None:
    """Raise JobError unless the blocks of `written`, and its predictions, are those of the model in memory.

    `kept` are the numbers of the blocks in memory that were written. Without samples some tokens are tried, and models
    of images or sounds are not.
    """
    model, samples = opened.model, opened.samples
    if samples is None and model.main_input_name != "input_ids":
        return  # there are no images or sounds
    if samples is None:
        names = ("input_ids", "decoder_input_ids") if model.config.is_encoder_decoder else ("input_ids",)
        batch: Mapping[str, Tensor] = dict.fromkeys(names, torch.arange(8)[None])
    else:
        batch = select_rows(samples.batch, slice(0, 1))
        batch = {name: x[:, :_TOKENS] for name, x in batch.items()} if set(batch) == {"input_ids"} else batch
    blocks, outputs, off = list(blocks_of(model).values()), dict[int, tuple[Any, Tensor]](), list[float]()

    def note(index: int, output: Any, added: Tensor) -> None:
        outputs[index] = output, added  # blocks of a tower do not run without images

    def compared(index: int, output: Any, added: Tensor) -> Any:
        off.append(_difference(outputs[index][1], added))
        return outputs[index][0]

    here = _predictions(model, batch, [blocks[i] for i in kept], note)
    try:
        off.append(_difference(here, _predictions(written, batch, list(blocks_of(written).values()), compared)))
    except Exception as error:  # whatever a model of that shape raises
        found = in_one_line(error)
    else:
        if all(x <= _TOLERANCE.get(model.dtype, 5e-3) for x in off):
            return
        found = f"hidden states or predictions differ by {max(off):.2g} of their size"
    who = f"{model.config.model_type} models cannot have this shape"
    raise JobError(f"The files do not compute what the model in memory computes ({found}): {who}. Nothing was written.")


Seen = Callable[[int, Any, Tensor], Any]


def _predictions(
    model: PreTrainedModel, batch: Mapping[str, Tensor], blocks: Sequence[nn.Module], seen: Seen
) -> Tensor:
    """The predictions of a model.

    `seen` is called with every block's number, its output and what it adds to the hidden states; what it returns, if
    anything, replaces the output.
    """

    def hook(index: int, block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before = split_call(block.forward, args, kwargs)[0]
        after = states_of(output)
        return seen(index, output, after.float() - before.float() if after.shape == before.shape else after)

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(partial(hook, index), with_kwargs=True).remove)
        with same_random_numbers():
            return predictions(model, model(**model_inputs(model, batch), **call_options(model)))


def _difference(a: Tensor, b: Tensor) -> float:
    """The median over tokens of the relative difference of vectors [..., width]."""
    change, size = (b.float() - a.float()).norm(dim=-1), a.float().norm(dim=-1)
    return float((change / size.clamp_min(1e-9)).median())
