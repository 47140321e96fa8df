"""Generate text greedily, and measure the time of the prompt and of each new token."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from billhook.ambient import pinned
from billhook.architectures.config import context_length, positions_needed, vocabulary_size
from billhook.engine.batch import model_inputs
from billhook.errors import BillhookError, JobError
from billhook.store.checkpoint import quiet
from billhook.store.files import untrusted
from billhook.text.windows import check_ids


@dataclass(frozen=True)
class Generated:
    """`ids` int64 [batch, prompt + new]; seconds to the first new token, and from there to the last."""

    ids: Tensor
    prompt: int
    prefill_s: float
    decode_s: float

    @property
    def new(self) -> int:
        """New tokens per row of the batch."""
        return self.ids.shape[1] - self.prompt

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompts read per second."""
        return self.ids.shape[0] * self.prompt / self.prefill_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens generated per second, not counting the first of each row; None if there is no second one."""
        return self.ids.shape[0] * (self.new - 1) / self.decode_s if self.new > 1 else None


class Clock(BaseStreamer):
    """Records the time of each token, and passes the token on; `given` are the tokens of the decoder before them, the
    prompt or, of an encoder-decoder, a start token."""

    def __init__(self, token: Callable[[Tensor], None] = lambda ids: None) -> None:
        self.times: list[float] = []
        self.given = 0
        self._token = token

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt first, then with the new token of each row."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.given = value.shape[1]
        else:
            self._token(value)

    def end(self) -> None:
        """Called by `generate` after the last token."""


def _refuse_nan(ids: Tensor, logits: Tensor) -> Tensor:
    """A logits processor that raises JobError for NaN, of which greedy decoding would make token 0."""
    if logits.isnan().any():
        raise JobError("The model's predictions are NaN: check its weights, or try another --dtype.")
    return logits


@pinned
def generate(
    model: PreTrainedModel,
    ids: Tensor,
    new: int,
    *,
    stop: bool = True,
    token: Callable[[Tensor], None] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Generated:
    """Continue prompts, int64 [batch, prompt], greedily by at most `new` tokens; with `stop` False by exactly `new`.

    `token` is called with each new token of a batch of one. `inputs` are other inputs of the model, such as the pixel
    values of an image-text model. Raises BillhookError beyond the model's context or
    vocabulary.
    """
    if new < 1:
        raise BillhookError(f"Generate at least one token, got {new}.")
    context = context_length(model.config)
    if context is not None and positions_needed(model.config, ids.shape[1], new) > context:
        tokens = f"{ids.shape[1]} tokens of prompt and {new} new ones"
        raise BillhookError(f"{tokens} do not fit the model's context of {context}.")
    check_ids(ids, vocabulary_size(model), "The prompt")
    clock = Clock(token or (lambda ids: None))
    unending = {} if stop else {"min_new_tokens": new, "eos_token_id": None}
    more = {"attention_mask": torch.ones_like(ids), **(inputs or {})}
    ids, given = ids.to(model.device), model_inputs(model, more)
    wrong = f"transformers cannot generate with {model.name_or_path or type(model).__name__}"
    with torch.no_grad(), untrusted(wrong, "Check its generation_config.json."), quiet():
        start = time.perf_counter()
        out = model.generate(  # type: ignore[operator]
            ids, **given, **unending, max_new_tokens=new, do_sample=False, num_beams=1, use_cache=True,
            temperature=None, top_p=None, top_k=None,
            streamer=clock, logits_processor=LogitsProcessorList([_refuse_nan]),
        )  # fmt: skip
    assert isinstance(out, Tensor)
    out = torch.cat([ids, out[:, clock.given :]], 1)
    return Generated(out.cpu(), ids.shape[1], clock.times[1] - start, clock.times[-1] - clock.times[1])
