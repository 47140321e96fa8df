"""The record of `billhook eval`: perplexity by either protocol, distance from the dense model, tasks.

The record contains protocol, windows, length and versions, so that only comparable records are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.ambient import pinned
from billhook.architectures.sources import resolve
from billhook.engine.streaming import open_streamed
from billhook.errors import BillhookError
from billhook.evaluation.block_errors import block_errors, block_outputs
from billhook.evaluation.harness import PAPER7, check_tasks, evaluate_tasks
from billhook.evaluation.items import TaskResult, evaluate_file, load_items
from billhook.evaluation.perplexity import evaluate
from billhook.evaluation.rows import evaluate_rows
from billhook.evaluation.word_perplexity import evaluate_words
from billhook.packed.loading import load
from billhook.steps.facts import all_versions, model_facts
from billhook.store.arguments import check_fields
from billhook.store.checkpoint import is_compressed, load_tokenizer, read_config
from billhook.store.compute import chosen_device, chosen_dtype, dtype_name, lacking_gib
from billhook.tasks.base import Home, RowTask, WindowTask
from billhook.tasks.opening import task_of, task_of_config
from billhook.tasks.token_windows import window_length
from billhook.text.chat import chat_of
from billhook.text.corpus import documents, is_token_file, source_name

PROTOCOLS = ("token", "word", "both")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class EvalConfig:
    """How to evaluate a model; `tasks` are names of lm-eval, `paper7`, or .jsonl files of items."""

    data: str | None = None
    length: int | None = None
    limit: int | None = None
    protocol: str = "token"
    against: str | Path | None = None
    tasks: Sequence[str | Path] = ()
    few_shot: int | None = None
    task_limit: int | None = None
    batch_size: int | None = None
    bos: str = "auto"
    skip_unreadable: bool = False
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self)


@pinned
def evaluate_model(model: str | Path, config: EvalConfig, progress: Progress = lambda what: None) -> dict[str, Any]:
    """Load a dense or packed model and score it; docs/formats/json_output.md lists the fields.

    Raises BillhookError for an impossible configuration, before a model is loaded where possible.
    """
    source = resolve(model)
    kind = task_of_config(source, read_config(source, quantized=True)) if source.is_dir() else None
    if isinstance(kind, RowTask):
        return _rows(source, kind, config, progress)
    names, files = _tasks(config)
    loaded = _open(source, config)
    window = window_length(loaded, config.length)
    tokenizer = load_tokenizer(source, trust_remote_code=config.trust_remote_code)
    record = _facts(source, loaded)
    if config.data is not None and config.protocol != "word":
        record |= _token(loaded, tokenizer, config, window, progress)
    if config.data is not None and config.protocol != "token":
        reader = _need(tokenizer, "Word perplexity")
        texts = list(documents(config.data, "evaluation", True, chat_of(reader)))[: config.limit]
        scored = evaluate_words(loaded, reader, texts, window, source_name(config.data), progress, bos=config.bos)
        record["word"] = scored.to_dict()
    if names or files:
        results = _run_tasks(loaded, _need(tokenizer, "A task"), (names, files), window, config, progress)
        record["tasks"] = [asdict(task) for task in results]
    return record


def _rows(source: Path, task: RowTask, config: EvalConfig, progress: Progress) -> dict[str, Any]:
    """The record of a model that predicts one thing for a whole input."""
    if config.data is None:
        raise BillhookError("Say what to score: --data with a folder of images or FILE.npz (text for a text encoder).")
    wrong = {"--tasks": config.tasks, "--few-shot": config.few_shot, "--protocol": config.protocol != "token"}
    if named := [name for name, given in wrong.items() if given not in (None, False, (), [])]:
        raise BillhookError(f"{' and '.join(named)} is for language models: leave it out.")
    loaded = _open(source, config)
    found = task.inputs(config.data, loaded, Home(source, config.trust_remote_code, config.skip_unreadable))
    dense = None if config.against is None else _open(resolve(config.against), config)
    record = _facts(source, loaded)
    batches, name = found.batches(config.limit), source_name(config.data)
    scores = evaluate_rows(loaded, batches, task, source=name, against=dense, progress=progress)
    return record | replace(scores, skipped=getattr(found, "skipped", 0) or None).to_dict()


def _facts(source: Path, model: PreTrainedModel) -> dict[str, Any]:
    """What a result can depend on: the model, its dtype, and versions."""
    facts = {"model": model_facts(source, model), "dtype": dtype_name(model.dtype)}
    return facts | {"versions": all_versions()}


def _tasks(config: EvalConfig) -> tuple[list[str], list[str]]:
    """Names of lm-eval tasks and files of items; raises BillhookError for an impossible configuration."""
    if config.data is None and not config.tasks:
        raise BillhookError(
            "Say what to score: --data FILE.txt, FILE.jsonl, TOKENS.safetensors or hub:wikitext2 (stdlib:heldout for "
            "the demo), or --tasks."
        )
    if config.protocol not in PROTOCOLS:
        raise BillhookError(f"Unknown protocol {config.protocol!r}: use {', '.join(PROTOCOLS)}.")
    if config.protocol != "token" and is_token_file(config.data or ""):
        raise BillhookError("Word perplexity needs words, and a token file has none: give a text.")
    if config.against is not None and (config.data is None or config.protocol == "word"):
        raise BillhookError("--against needs the windows of a text: give --data and the token protocol.")
    _check_used(config)
    named = [name for task in config.tasks for name in (PAPER7 if task == "paper7" else [str(task)])]
    files = [name for name in named if name.endswith(".jsonl")]
    names = [name for name in named if not name.endswith(".jsonl")]
    if config.few_shot is not None and not names:
        raise BillhookError("--few-shot is for tasks of lm-eval; the prompts of a file are not changed: leave it out.")
    for file in files:
        load_items(file)
    if names:
        check_tasks(names)
    return names, files


def _check_used(config: EvalConfig) -> None:
    """Raise BillhookError for an option that would have no effect."""
    if config.data is None and (config.protocol != "token" or config.limit is not None):
        raise BillhookError("--protocol and --limit are for --data: leave them out (for tasks there is --task-limit).")
    if config.data is None and config.bos != "auto":
        raise BillhookError("--bos is for --data: leave it out. Tasks follow the tokenizer, as lm-eval does.")
    if config.batch_size is not None and (config.data is None or config.protocol == "word"):
        raise BillhookError("--batch-size is for token perplexity: tasks and word perplexity choose their own.")
    if config.task_limit is not None and not config.tasks:
        raise BillhookError("--task-limit is for --tasks: leave it out (for windows there is --limit).")


def _open(source: Path, config: EvalConfig) -> PreTrainedModel:
    """Load a dense or packed model, without autotuning, so that results are reproducible to the last bit.

    A dense model that does not fit in memory is opened with one block at a time in memory.
    """
    device = chosen_device(config.device)
    dtype = chosen_dtype(config.dtype, device, source)
    trust = config.trust_remote_code
    if (lacking := lacking_gib(source, dtype, device)) is not None:
        if is_compressed(read_config(source, quantized=True)):
            raise BillhookError(
                f"The weights of {source} need {lacking[0]:.1f} GiB decoded, and {lacking[1]:.1f} GiB are free. Decode "
                f"them with billhook export {source} --to dense -o DENSE: DENSE is read one block at a time."
            )
        auto_class = task_of_config(source, read_config(source)).auto_class
        return open_streamed(source, auto_class, dtype=dtype, device=device, trust_remote_code=trust).model
    return load(source, dtype=dtype, device=device, trust_remote_code=trust, tune=False)


def _token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    config: EvalConfig,
    window: int,
    progress: Progress,
) -> dict[str, Any]:
    """The fields of token perplexity, and of the comparison with the dense model."""
    assert config.data is not None
    task = task_of(model)
    assert isinstance(task, WindowTask)
    windows, scoring = task.evaluation(config.data, tokenizer, model, window, config.limit, bos=config.bos)
    dense = None if config.against is None else _open(resolve(config.against), config)
    record = evaluate(
        model, windows, scoring=scoring, against=dense, batch_size=config.batch_size, progress=progress
    ).to_dict()
    record["source"] = source_name(record["source"])
    if dense is not None:
        batch = scoring.batch(windows.ids)
        errors = block_errors(block_outputs(model, batch), block_outputs(dense, batch))
        record["against"] |= {} if errors is None else {"error_by_block": errors}
    return record


def _need(tokenizer: PreTrainedTokenizerBase | None, who: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise BillhookError(f"{who} needs text, and the model has no tokenizer to read it with.")
    return tokenizer


def _run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: tuple[list[str], list[str]],
    longest: int,
    config: EvalConfig,
    progress: Progress,
) -> list[TaskResult]:
    """Score the `tasks`: names of lm-eval tasks, and files of items."""
    (names, files), limit = tasks, config.task_limit
    found = [evaluate_file(model, tokenizer, file, longest, limit, progress) for file in files]
    if names:
        found += evaluate_tasks(model, tokenizer, names, longest, few_shot=config.few_shot, limit=limit)
    return found
