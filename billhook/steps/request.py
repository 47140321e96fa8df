"""What a run is asked for, and opening what it names: the model and the calibration text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from billhook import __version__ as VERSION
from billhook.architectures.layers import Layer, check_finite, find_layers, select_layers
from billhook.distributed.collectives import in_batches, world
from billhook.engine.activation_store import SPILL_GIB
from billhook.engine.gradient_file import Gradients
from billhook.engine.loop import Group, Rounding
from billhook.engine.streaming import open_streamed, resident
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import check_length, context_length, vocabulary_size
from billhook.plan.plan import Plan
from billhook.plan.table import Table
from billhook.recover.blockwise import Refining
from billhook.steps.state import check_place
from billhook.store.checkpoint import check_directory, load_model, load_tokenizer, model_digest, resolve
from billhook.store.files import sha256
from billhook.store.output import check_output
from billhook.store.record import Record, history
from billhook.store.shards import read_shard
from billhook.store.sinks import mismatch
from billhook.text.corpus import source_name
from billhook.text.windows import Tokens, check_ids, digest, load_calibration, whole_ids

TOKENS_A_BATCH = 4096  # enough rows to keep a matrix product busy
ACTIVATION_BYTES = 16 << 20  # of the widest layer of a block; more would not be faster on a CPU, and counts in the peak


@dataclass(frozen=True)
class Request:
    """Everything a pruning run can be asked for; the field names are those of the command line."""

    model: str | Path | PreTrainedModel
    sparsity: float | None = None
    output: str | Path | None = None
    criterion: str = "wanda"
    allocator: str = "uniform"
    pattern: str = "unstructured"
    options: Mapping[str, Any] = field(default_factory=dict)
    plan: str | Path | Plan | None = None
    table: str | Path | Table | None = None
    gradients: str | Path | Gradients | None = None
    calibration: str | Path | Tensor | None = None
    samples: int = 128
    length: int | None = None
    sampling: str = "packed"
    batch_size: int | None = None
    seed: int = 0
    targets: str | Sequence[str] = ()
    ignore: str | Sequence[str] = ()
    group: Group | None = None
    rounding: Rounding = "exact"
    refine: Refining = "none"
    device: str = "cpu"
    dtype: str = "auto"
    overwrite: bool = False
    resume: bool = False
    spill_gib: float = SPILL_GIB
    pack: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Opened:
    """What a request names, loaded and checked; `calibration` is None and `batches` empty where no text is needed."""

    source: Path | None
    model: PreTrainedModel
    layers: list[Layer]
    calibration: Tokens | None
    batches: list[Tensor]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """`model_facts` of what was opened; reading the files for the digest takes time, so it is done once."""
        return model_facts(self.source, self.model)

    @cached_property
    def history(self) -> Record | None:
        """The record of what was done to the model before, None where there is none."""
        return None if self.source is None else history(self.source)


def open_request(request: Request, needs_text: bool, who: str, *, streamed: bool = False) -> Opened:
    """Load the model, choose its layers, and draw the calibration windows if `who` needs text; cheapest checks first.

    `streamed` asks for a model directory with one block in memory at a time.
    """
    _check_words(request)
    if needs_text and request.calibration is None:
        raise BillhookError(
            f"{who} looks at activations: give text like the model was trained on with --calibration FILE.txt, "
            "FILE.jsonl, "
            "TOKENS.safetensors or hub:c4 (the demo uses stdlib:train, Python source)."
        )
    source, model = _open_model(request, streamed)
    layers = select_layers(find_layers(model), listed(request.targets), listed(request.ignore))
    for index in sorted({layer.block for layer in layers}):
        with resident(model, index, ahead=index + 1):
            check_finite(layer for layer in layers if layer.block == index)
    if not needs_text:
        return Opened(source, model, layers, None, [])
    windows = calibration_windows(request, source, model)
    batches = in_batches(windows.ids, request.batch_size or batch_size(layers, windows.ids.shape[1]))
    return Opened(source, model, layers, windows, batches)


def _check_words(request: Request) -> None:
    if request.group not in (None, "row", "layer") or request.rounding not in ("exact", "floor"):
        raise BillhookError(
            f"group={request.group!r} must be row or layer, rounding={request.rounding!r} must be exact or floor."
        )
    if request.refine not in get_args(Refining):
        raise BillhookError(f"refine={request.refine!r} must be one of {', '.join(get_args(Refining))}.")
    if request.batch_size is not None and request.batch_size < 1:
        raise BillhookError(f"The batch size must be at least 1, got {request.batch_size}.")


def listed(patterns: str | Sequence[str]) -> list[str]:
    """Patterns as a list, where one alone was given as a string."""
    return [patterns] if isinstance(patterns, str) else list(patterns)


def batch_size(layers: Sequence[Layer], length: int) -> int:
    """Windows a batch: about 4096 tokens, or fewer where layers are wide."""
    widest = max(max(layer.shape) for layer in layers)
    return max(1, min(TOKENS_A_BATCH, ACTIVATION_BYTES // (4 * widest)) // length)


def _open_model(request: Request, streamed: bool) -> tuple[Path | None, PreTrainedModel]:
    """Check the output place, then load the model (or take the one in memory, with its experts made observable)."""
    output = None if request.output is None else Path(request.output).expanduser().resolve()
    if isinstance(request.model, PreTrainedModel):
        if request.resume:
            raise BillhookError("Only a run on a model directory can be resumed, and this model is in memory.")
        if output is not None:
            check_output(output, overwrite=request.overwrite)
        return None, request.model
    if not isinstance(request.model, str | Path):
        kind = type(request.model).__name__
        raise BillhookError(f"The model must be a directory, a hub name or a transformers PreTrainedModel, got {kind}.")
    source = resolve(request.model)
    checkpoint = check_directory(source)
    if output is not None:
        continued = check_place(output, resume=request.resume, overwrite=request.overwrite)
        check_output(output, source, overwrite=request.overwrite, needed=0 if continued else checkpoint.bytes)
    options: dict[str, Any] = {
        "dtype": request.dtype,
        "device": request.device,
        "trust_remote_code": request.trust_remote_code,
    }
    if streamed:
        model = open_streamed(source, **options)
        if output is None or mismatch(model, [read_shard(file) for file in checkpoint.weights]) is None:
            return source, model
    return source, load_model(source, **options)


def window_length(request: Request, model: PreTrainedModel) -> int:
    """Tokens in a window: those asked for, else 2048 or the context if that is shorter; raises BillhookError beyond the
    context."""
    length = min(2048, context_length(model.config) or 2048) if request.length is None else request.length
    check_length(model.config, length)
    return length


def calibration_windows(request: Request, source: Path | None, model: PreTrainedModel) -> Tokens:
    """The calibration windows a request asks for, int64 [samples, length], checked against the model's vocabulary and
    context."""
    vocabulary = vocabulary_size(model)
    if not isinstance(request.calibration, str | Path):
        ids = whole_ids(request.calibration, "calibration")
        check_ids(ids, vocabulary, "calibration")
        check_length(model.config, ids.shape[1])
        return Tokens(ids, "given as a tensor", digest(ids), "given")
    length = window_length(request, model)
    home = source or (
        Path(model.name_or_path) if model.name_or_path else None
    )  # a model in memory knows where it was loaded from
    tokenizer = None if home is None else load_tokenizer(home, trust_remote_code=request.trust_remote_code)
    return load_calibration(
        str(request.calibration),
        tokenizer,
        samples=request.samples,
        length=length,
        seed=request.seed,
        sampling=request.sampling,
        vocab_size=vocabulary,
    )


def calibration_facts(opened: Opened) -> dict[str, Any]:
    """What identifies calibration windows in a table or billhook.json."""
    tokens = opened.calibration
    assert tokens is not None
    samples, length = tokens.ids.shape
    identity = {"source": source_name(tokens.source), "digest": tokens.digest, "sampling": tokens.sampling}
    return identity | {"samples": samples, "length": length, "batch_size": len(opened.batches[0])}


def model_facts(source: Path | None, model: PreTrainedModel) -> dict[str, Any]:
    """What identifies a model in tables, plans and billhook.json."""
    return {
        "name": _model_name(source, model),
        "type": model.config.model_type,
        "digest": None if source is None else model_digest(source),
    }


def _model_name(source: Path | None, model: PreTrainedModel) -> str:
    """The folder's name; for the hub's cache, whose folders are `models--OWNER--NAME/snapshots/COMMIT`, OWNER/NAME;
    else the class's."""
    if source is None:
        return type(model).__name__
    if source.parent.name == "snapshots":
        return source.parents[1].name.removeprefix("models--").replace("--", "/")
    return source.resolve().name


def identity(
    request: Request, opened: Opened, options: Mapping[str, Any], plan: Plan | None, table: Table | None
) -> dict[str, Any]:
    """What an unfinished run must agree in to be continued: versions, model, data and everything that changes the
    result.

    `options` are all those of the methods, `plan` and `table` those that were given.
    """
    given = {"plan": None if plan is None else plan.to_json(), "table": None if table is None else asdict(table)}
    same = ("sparsity", "pattern", "allocator", "criterion", "group", "rounding", "refine", "seed", "dtype", "device")
    return {
        "version": f"{VERSION}, torch {torch.__version__}, transformers {transformers.__version__}",
        "processes": world(),
        "model": opened.facts["digest"],
        "history": None if opened.history is None else _json_digest(opened.history.to_json()),
        **{key: getattr(request, key) for key in same},
        "targets": listed(request.targets),
        "ignore": listed(request.ignore),
        "options": dict(options),
        **{key: None if value is None else _json_digest(value) for key, value in given.items()},
        "gradients": None if request.gradients is None else _gradients_digest(request.gradients),
        "calibration": None if opened.calibration is None else calibration_facts(opened),
    }


def _json_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _gradients_digest(given: str | Path | Gradients) -> str:
    return sha256(given.path if isinstance(given, Gradients) else Path(given))
