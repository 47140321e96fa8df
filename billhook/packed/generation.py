"""Generate text with a clock beside it: how long the prompt takes, and how long each further token."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.architectures.config import context_length
from billhook.errors import BillhookError
from billhook.store.checkpoint import quiet


@dataclass(frozen=True)
class Generated:
    """`ids` int64 [batch, prompt + new]; seconds to the first new token (the prompt), and from there to the last."""

    ids: Tensor
    prompt: int
    prefill_s: float
    decode_s: float

    @property
    def new(self) -> int:
        """New tokens in a row of the batch."""
        return self.ids.shape[1] - self.prompt

    @property
    def prefill_tokens_per_s(self) -> float:
        """Tokens of the prompts read in a second."""
        return self.ids.shape[0] * self.prompt / self.prefill_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens made in a second, the first of each row apart; None where there was no second."""
        return self.ids.shape[0] * (self.new - 1) / self.decode_s if self.new > 1 else None


class Clock(BaseStreamer):
    """Notes the time of each token, and hands it on."""

    def __init__(self, token: Callable[[Tensor], None] = lambda ids: None) -> None:
        self.times: list[float] = []
        self._token = token

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt first, then with the new token of each row."""
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            self._token(value)

    def end(self) -> None:
        """Called by `generate` after the last token."""


def generate(
    model: PreTrainedModel, ids: Tensor, new: int, *, stop: bool = True, token: Callable[[Tensor], None] | None = None
) -> Generated:
    """Continue prompts, int64 [batch, prompt], with the likeliest tokens; with `stop` False always by `new` tokens.

    `token` is called with each new token of a batch of one. Raises BillhookError when that is longer than the model's
    context.
    """
    context = context_length(model.config)
    if new < 1 or (context is not None and ids.shape[1] + new > context):
        raise BillhookError(
            f"{ids.shape[1]} tokens of prompt and {new} new ones do not fit the model's context of {context}: "
            "ask for fewer."
            if new > 0
            else f"Generate at least one token, got {new}."
        )
    clock = Clock(token or (lambda ids: None))
    options: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if not stop:
        options |= {"min_new_tokens": new, "eos_token_id": None}
    ids = ids.to(model.device)
    with torch.no_grad(), quiet():
        start = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, use_cache=True, **options)  # type: ignore[operator]
    assert isinstance(out, Tensor)
    return Generated(out.cpu(), ids.shape[1], clock.times[1] - start, clock.times[-1] - clock.times[1])


class Printer:
    """Prints the words of a growing text as soon as they are whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0

    def __call__(self, ids: Tensor) -> None:
        """Take the next token."""
        self._ids += ids.tolist()
        text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the middle of a character of several tokens
            sys.stdout.write(text[self._shown :])
            sys.stdout.flush()
            self._shown = len(text)
