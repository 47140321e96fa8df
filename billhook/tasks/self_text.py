"""Calibration text that the model writes itself.

Where little text is at hand, what is fitted to it (updated weights, a tuned block, an allocation) fits that text more
than the model. The model's own text is like what it was trained on, needs no data, and there is as much of it as
wanted: self-calibration (Williams et al. 2024, arXiv:2410.17170; Ji et al. 2024, arXiv:2410.17711). Every document
begins with the model's start token and is drawn at temperature 1 from the whole distribution, until it is as long as a
window or the model ends it; documents are put one after the other and cut into windows, as the text of a file is. It
knows nothing of what else the model will be asked: text of the real use, where there is some, belongs beside it.

The model is in memory as a whole. A batch of documents takes a forward pass for every position; there are up to
`_BATCH` in one, as many as have keys and values no larger than the model itself.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from billhook import __version__
from billhook.architectures.config import check_length
from billhook.engine.walk import evaluating
from billhook.errors import BillhookError, JobError
from billhook.steps.request import Request, calibration_windows, window_length
from billhook.store.checkpoint import check_directory, load_model, quiet, resolve
from billhook.store.files import write_atomic
from billhook.text.windows import Tokens, digest

Progress = Callable[[str], None]  # called for every position of a batch of documents
_BATCH = 64  # documents at once, at most
_EMPTY = 256  # documents in a row with nothing in them, after which there will be none
_CACHE_BYTES = 1 << 30  # of keys and values, or those of the model if it is larger


@dataclass(frozen=True)
class Task:
    """A model, the calibration windows that come first (None: no text), and how many windows of `length` tokens it is
    to write."""

    model: PreTrainedModel
    given: Tokens | None
    windows: int
    length: int
    seed: int

    @property
    def positions(self) -> int:
        """Forward passes that it takes, or more where documents end before a window does."""
        return -(-self.windows // _documents_at_once(self.model, self.length)) * (self.length - 1)


@dataclass(frozen=True)
class Written:
    """What a file of calibration text holds: windows of a SOURCE (None without one), those the model wrote after them,
    tokens in each."""

    source: str | None
    samples: int
    windows: int
    length: int
    digest: str


def open_task(request: Request, windows: int) -> Task:
    """Load the model of a request and draw its calibration windows, if it asks for any; raises BillhookError as both
    do."""
    source = resolve(request.model)  # type: ignore[arg-type]
    check_directory(source)
    model = load_model(source, dtype=request.dtype, device=request.device, trust_remote_code=request.trust_remote_code)
    given = None if request.calibration is None else calibration_windows(request, source, model)
    return Task(
        model, given, windows, window_length(request, model) if given is None else given.ids.shape[1], request.seed
    )


def make_text(task: Task, path: Path, progress: Progress = lambda position: None) -> Written:
    """Write the windows of a task to `path`, a file of tokens, atomically; raises as `write_windows` does."""
    given, ids = task.given, write_windows(task.model, task.windows, task.length, seed=task.seed, progress=progress)
    ids = ids if given is None else torch.cat([given.ids, ids])
    source, samples = (None, 0) if given is None else (given.source, len(given.ids))
    made = Written(source, samples, task.windows, task.length, digest(ids))
    about = json.dumps({"made_by": f"billhook {__version__}", "seed": task.seed, **asdict(made)})
    write_atomic(
        path, lambda temporary: save_file({"tokens": ids.int()}, temporary, {"about": about})
    )  # the order of several keys varies
    return made


@torch.no_grad()
def write_windows(
    model: PreTrainedModel, windows: int, length: int, *, seed: int = 0, progress: Progress = lambda position: None
) -> Tensor:
    """Let the model write text: token ids int64 [windows, length] on the CPU. Same model, seed and machine, same ids.

    Raises BillhookError for a model that names neither a start token nor an end token and for windows longer than its
    context, JobError where its predictions are not finite or end every document before it begins.
    """
    if windows < 1 or length < 2:
        raise BillhookError(
            f"The model must write at least 1 window of at least 2 tokens, got windows={windows}, length={length}."
        )
    check_length(model.config, length)
    start, ends = _marks(model)
    random = torch.Generator(model.device).manual_seed(seed)
    flat, empty = list[int](), 0
    with evaluating(model), quiet():
        while (missing := windows * length - len(flat)) > 0:
            count = min(_documents_at_once(model, length), -(-missing // length))
            documents = _documents(model, (start, ends), (count, length), random, progress).tolist()
            found = [
                document[: next((at for at, token in enumerate(document) if at and token in ends), length)]
                for document in documents
            ]
            empty = empty + len(found) if max(map(len, found)) == 1 else 0
            if empty >= _EMPTY:
                raise JobError(
                    "The model ends its text before it begins, so it cannot write any: give it real text with "
                    "--calibration."
                )
            flat += [token for document in found for token in document]
    return torch.tensor(flat[: windows * length]).view(windows, length)


def _documents_at_once(model: PreTrainedModel, length: int) -> int:
    """So many that their keys and values are within `_CACHE_BYTES` or the model's own size."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = max(_CACHE_BYTES, sum(p.numel() * p.element_size() for p in model.parameters()))
    return max(1, min(_BATCH, room // (2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * length)))


def _marks(model: PreTrainedModel) -> tuple[int, set[int]]:
    """The token that begins a document (where none is named, one that ends it), and those that end one."""
    configs = [
        config for config in (model.config.get_text_config(decoder=True), model.generation_config) if config is not None
    ]
    starts = [config.bos_token_id for config in configs if getattr(config, "bos_token_id", None) is not None]
    ends = [config.eos_token_id for config in configs if getattr(config, "eos_token_id", None) is not None]
    known = [token for end in ends for token in (end if isinstance(end, list) else [end])]
    if not starts + known:
        raise BillhookError(
            "The model names neither bos_token_id nor eos_token_id, so nothing can begin its text: add one to "
            "config.json."
        )
    return (starts + known)[0], set(known)


def _documents(
    model: PreTrainedModel,
    marks: tuple[int, set[int]],
    shape: tuple[int, int],
    random: torch.Generator,
    progress: Progress,
) -> Tensor:
    """Documents [count, length], drawn token by token, or shorter where all of them have ended; what follows an end
    means nothing."""
    token = torch.full((shape[0], 1), marks[0], device=model.device)
    ends = torch.tensor(sorted(marks[1]), dtype=torch.int64, device=model.device)
    ids, past, ended = [token], None, torch.zeros_like(token, dtype=torch.bool)
    for position in range(1, shape[1]):
        step = model(input_ids=token, past_key_values=past, use_cache=True)
        past = step.past_key_values
        likely = step.logits[:, -1].float().softmax(-1)
        if not torch.isfinite(likely).all():
            raise JobError("The model's predictions are not finite, so it cannot write text: try --dtype float32.")
        token = torch.multinomial(likely, 1, generator=random)
        ids.append(token)
        progress(f"token {position}")
        ended |= torch.isin(token, ends)
        if ended.all():
            break
    return torch.cat(ids, 1).cpu()
