"""What the models of a benchmark are given: decided by their configurations before one is loaded, and random.

Models that generate text, those that also read images among them, get prompts of random tokens. Encoders of text read
the same, and generate nothing. Image models read random pixel values of the size in config.json. No token is one that
the configuration names, such as padding or the place of an image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from billhook.architectures.config import context_length, image_shape, named_tokens, positions_needed, vocabulary_size
from billhook.errors import BillhookError
from billhook.store.checkpoint import check_trusted, class_names, loading, read_config
from billhook.tasks.opening import continues_text, task_of_config

PROMPTS = (16, 128, 512)
NEW = 64
_GENERATES = "generates text"
_READS = {"input_ids": "reads text", "pixel_values": "reads images"}


class Run(NamedTuple):
    """What is measured at once: `prompt` tokens in each row of a batch (None: images), and `new` ones after them (None:
    the model generates nothing)."""

    batch: int
    prompt: int | None = None
    new: int | None = None

    def __str__(self) -> str:
        return f"batch {self.batch}" + ("" if self.prompt is None else f", prompt {self.prompt}")


def runs_of(
    paths: Sequence[Path],
    batches: Sequence[int],
    prompts: Sequence[int] | None,
    new: int | None,
    *,
    trust_remote_code: bool = False,
) -> list[Run]:
    """Every batch size with every prompt length, or with images.

    `prompts` are by default those of `PROMPTS` that the models' contexts have room for, and `new` is `NEW`. Raises
    BillhookError, before a model is loaded, for models that do different things or read neither text nor images, for
    options that they have no use for, and for prompts that are too long.
    """
    found = {path: _read(path, trust_remote_code) for path in paths}
    kinds = {path: kind for path, (_, kind) in found.items()}
    first, kind = next(iter(kinds.items()))
    for path, other in kinds.items():
        if other != kind:
            raise BillhookError(f"{first} {kind} and {path} {other}: measure them in two runs.")
    if kind != _GENERATES and new is not None:
        raise BillhookError(f"{first} {kind} and generates nothing: leave out --new.")
    if kind == _READS["pixel_values"]:
        if prompts is not None:
            raise BillhookError(f"{first} {kind}, and has no prompts: leave out --prompt.")
        return [Run(batch) for batch in batches]
    new = (new or NEW) if kind == _GENERATES else None
    fitting = list(_fitting({path: config for path, (config, _) in found.items()}, prompts, new))
    return [Run(batch, prompt, new) for batch in batches for prompt in fitting]


def _read(path: Path, trust_remote_code: bool) -> tuple[Any, str]:
    """The configuration of a model, and what it does; raises BillhookError for one that reads neither text nor images,
    or generates text only for images."""
    given = read_config(path, quantized=True)
    task = task_of_config(path, given)
    check_trusted(path, given, task.auto_class, trust_remote_code)
    with loading(path):
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    known = class_names(task.auto_class).get(config.model_type, ())
    name = next((name for name in (*(given.get("architectures") or ()), *known) if name in known), "")
    main_input = getattr(transformers, name, PreTrainedModel).main_input_name
    what = f"{path} is {config.model_type}, which reads {main_input}"
    if continues_text(task):
        if main_input != "input_ids":
            raise BillhookError(f"{what} before it generates text: bench gives prompts alone.")
        return config, _GENERATES
    if main_input not in _READS:
        raise BillhookError(f"{what}: bench measures models that read text or images.")
    return config, _READS[main_input]


def _fitting(configs: dict[Path, Any], prompts: Sequence[int] | None, new: int | None) -> Iterator[int]:
    """The prompts for which every model has room, with the `new` tokens after them, in order.

    Raises BillhookError where one that was given is too long, or none is left.
    """
    for prompt in PROMPTS if prompts is None else prompts:
        needed = {path: positions_needed(config, prompt, new or 0) for path, config in configs.items()}
        short = {path: c for path, config in configs.items() if (c := context_length(config)) and needed[path] > c}
        if not short:
            yield prompt
        elif prompts is not None or prompt == min(PROMPTS):
            path, context = min(short.items(), key=lambda pair: pair[1])
            more, smaller = ("", "") if new is None else (f" with {new} new ones", " or --new")
            room = f"{path.name} reads at most {context} tokens, and a prompt of {prompt}{more} is longer"
            raise BillhookError(f"{room}: give smaller --prompt{smaller}.")


def random_inputs(model: PreTrainedModel, run: Run) -> Tensor:
    """Token ids int64 [batch, prompt], or pixel values float32 [batch, channels, height, width]; the same each time."""
    random = torch.Generator().manual_seed(0)
    if run.prompt is None:
        return torch.randn(run.batch, *image_shape(model.config), generator=random)
    every = torch.arange(vocabulary_size(model))
    allowed = every[~torch.isin(every, torch.tensor(sorted(named_tokens(model.config)), dtype=torch.int64))]
    return allowed[torch.randint(len(allowed), (run.batch, run.prompt), generator=random)]
