"""Tasks of lm-evaluation-harness on a model in memory. Needs the extra `eval`; the harness is imported only here.

The harness brings prompts, few-shot examples and metrics, and fetches each task's data from the hub; everything is left
as it is there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from billhook.errors import BillhookError, JobError
from billhook.evaluation.batching import batch_size
from billhook.evaluation.items import TaskResult
from billhook.registry import hint

PAPER7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
LOCAL = (
    "a file of items works without network: "
    '--tasks FILE.jsonl, one {"requests": [[context, continuation], ...], "gold": 0} a line'
)


def check_tasks(names: Sequence[str]) -> Any:
    """The harness's task manager, once every name is known to it; raises BillhookError for one that is not, with the
    nearest."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise BillhookError(
            f"The tasks {', '.join(names)} need lm-eval: pip install 'billhook[eval]'; {LOCAL}."
        ) from None
    with _quietly():
        manager = TaskManager(include_defaults=not all(name.endswith(".yaml") for name in names))
    for name in names:
        if not name.endswith(".yaml") and name not in manager.all_tasks:
            raise BillhookError(
                f"Unknown task {name!r}.{hint(name, [*PAPER7, *manager.all_tasks])} paper7 is the papers' seven; "
                "`lm-eval ls tasks` "
                f"lists all {len(manager.all_tasks)}; {LOCAL}."
            )
    return manager


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    longest: int,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
) -> list[TaskResult]:
    """Run tasks (names or lm-eval YAML files) and return one result for each, or for each of a group's parts.

    `few_shot` None keeps each task's own number of examples, `limit` takes only the first items of each. Raises
    BillhookError for an unknown task and for data that cannot be had.
    """
    manager = check_tasks(names)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    size = batch_size(longest, int(model.config.get_text_config(decoder=True).vocab_size), 4)
    with _quietly():
        wrapped = HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=longest, batch_size=size, softmax_dtype="float32"
        )
        try:
            found = simple_evaluate(
                wrapped,
                tasks=list(names),
                num_fewshot=few_shot,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=100,
                log_samples=False,
            )
        except Exception as error:  # the harness, `datasets` and the hub raise dozens of unrelated kinds
            raise _explained(error, names) from None
    assert found is not None
    return [
        _result(name, metrics, found)
        for name, metrics in found["results"].items()
        if "acc,none" in metrics or _other(metrics)
    ]


def _result(name: str, metrics: dict[str, Any], found: dict[str, Any]) -> TaskResult:
    config = found["configs"].get(name, {})
    shots = found.get("n-shot", {}).get(name, config.get("num_fewshot", 0)) or 0
    count = found["n-samples"].get(name, {}).get("effective") or 0
    key = "acc" if "acc,none" in metrics else _other(metrics)
    acc, error = metrics[f"{key},none"], metrics.get(f"{key}_stderr,none")
    label = name if key == "acc" else f"{name} ({key})"
    norm, norm_error = metrics.get("acc_norm,none"), metrics.get("acc_norm_stderr,none")
    identity = f"task version {found['versions'].get(name)}" + ("" if count else ", group")
    return TaskResult(
        label,
        acc,
        _number(error),
        norm,
        _number(norm_error),
        count,
        f"{shots}-shot",
        f"lm-eval {version('lm_eval')}",
        identity,
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None


def _other(metrics: dict[str, Any]) -> str:
    """The first metric of a task that has no accuracy."""
    return next(
        (
            k.removesuffix(",none")
            for k, v in metrics.items()
            if k.endswith(",none") and "stderr" not in k and isinstance(v, float)
        ),
        "",
    )


def _explained(error: Exception, names: Sequence[str]) -> Exception:
    text = f"{type(error).__name__} {error}"
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    if any(
        word in text
        for word in (
            "Connect",
            "offline",
            "Offline",
            "Max retries",
            "couldn't",
            "Couldn't",
            "resolve",
            "LocalEntryNotFound",
        )
    ):
        return BillhookError(
            f"The data of {', '.join(names)} cannot be fetched from the hub ({line}). Check the network; {LOCAL}."
        )
    return JobError(f"lm-eval failed on {', '.join(names)}: {line}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the harness from talking: its progress bars and log lines go nowhere."""
    import logging
    import os

    before, level = os.environ.get("TQDM_DISABLE"), logging.root.manager.disable
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before
