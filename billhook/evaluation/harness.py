"""Tasks of lm-evaluation-harness on a model in memory. Needs the extra `eval`; the harness is imported only here.

Prompts, few-shot examples, metrics and data (from the hub) are those of the harness.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Tokenizer

from billhook.errors import BillhookError, JobError, first_line
from billhook.evaluation.batching import batch_size
from billhook.evaluation.items import TaskResult
from billhook.registry import hint

PAPER7 = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
LOCAL = (
    "a file of items works without network: "
    '--tasks FILE.jsonl, one {"requests": [[context, continuation], ...], "gold": 0} a line'
)


def check_tasks(names: Sequence[str]) -> Any:
    """The harness's task manager; raises BillhookError for an unknown name, with the nearest one."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        need = f"The tasks {', '.join(names)} need lm-eval: pip install 'billhook[eval]'"
        raise BillhookError(f"{need}; {LOCAL}.") from None
    with _quietly():
        manager = TaskManager(include_defaults=not all(name.endswith(".yaml") for name in names))
    for name in names:
        if not name.endswith(".yaml") and name not in manager.all_tasks:
            known = f"paper7 is the papers' seven; `lm-eval ls tasks` lists all {len(manager.all_tasks)}; {LOCAL}"
            raise BillhookError(f"Unknown task {name!r}.{hint(name, [*PAPER7, *manager.all_tasks])} {known}.")
    return manager


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    names: Sequence[str],
    longest: int,
    *,
    few_shot: int | None = None,
    limit: int | None = None,
) -> list[TaskResult]:
    """Run tasks (names or lm-eval YAML files); one result for each task, or for each member of a group.

    `few_shot` None means each task's own number of examples; `limit` is the number of items of each task. Raises
    BillhookError for an unknown task and for data that cannot be fetched.
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
    results = found["results"].items()
    return [_result(name, metrics, found) for name, metrics in results if _main_metric(metrics)]


def _result(name: str, metrics: dict[str, Any], found: dict[str, Any]) -> TaskResult:
    config = found["configs"].get(name, {})
    shots = found.get("n-shot", {}).get(name, config.get("num_fewshot", 0)) or 0
    count = found["n-samples"].get(name, {}).get("effective") or 0
    key = _main_metric(metrics)
    keys = (f"{key}_stderr,none", "acc_norm,none", "acc_norm_stderr,none")
    error, norm, norm_error = (x if isinstance(x := metrics.get(k), float) else None for k in keys)
    label = name if key == "acc" else f"{name} ({key})"
    scored_by = f"lm-eval {version('lm_eval')}"
    identity = f"task version {found['versions'].get(name)}" + ("" if count else ", group")
    acc = metrics[f"{key},none"]
    return TaskResult(
        label, acc=acc, acc_error=error, acc_norm=norm, acc_norm_error=norm_error, items=count,
        few_shot=f"{shots}-shot", scored_by=scored_by, identity=identity,
    )  # fmt: skip


def _main_metric(metrics: dict[str, Any]) -> str:
    """The accuracy, or the first metric of a task without one; empty for no metric."""
    names = [k.removesuffix(",none") for k, v in metrics.items() if k.endswith(",none") and isinstance(v, float)]
    return "acc" if "acc,none" in metrics else next((name for name in names if "stderr" not in name), "")


def _explained(error: Exception, names: Sequence[str]) -> Exception:
    text = f"{type(error).__name__} {error}"
    line = first_line(error)
    if re.search("Connect|[oO]ffline|Max retries|[cC]ouldn't|resolve|LocalEntryNotFound", text):
        failed = f"The data of {', '.join(names)} cannot be fetched from the hub ({line})"
        return BillhookError(f"{failed}. Check the network; {LOCAL}.")
    return JobError(f"lm-eval failed on {', '.join(names)}: {line}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Suppress the progress bars and log lines of the harness."""
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
