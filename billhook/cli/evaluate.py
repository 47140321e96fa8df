"""`billhook eval`: perplexity, accuracy on images, distance from the dense model, zero-shot tasks."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from billhook.cli.common import emit, progress, say, split_list
from billhook.cli.options import AnyModel, Bos, Json, Length, Limit, Loading, SkipUnreadable

NAME = "eval"
EXAMPLES = """\b
Examples:
  billhook eval ./pruned --data text.txt
  billhook eval ./pruned --data hub:wikitext2 --length 2048 --against ./dense
  billhook eval ./pruned --data windows.safetensors --json
  billhook eval ./pruned --tasks paper7
  billhook eval ./pruned --tasks items.jsonl,arc_easy --report
  billhook eval ./pruned-vit --data images/ --against ./vit
"""
DATA_HELP = (
    "FILE.txt, FILE.jsonl, TOKENS.safetensors, hub:NAME[:config][:split] (hub:wikitext2, hub:c4, hub:ptb), "
    "stdlib:heldout; of images a folder (labels are the names of its folders), FILE.npz or hub:NAME."
)
PROTOCOL_HELP = "token: the papers', over non-overlapping windows; word: lm-evaluation-harness's, over whole documents."
AGAINST_HELP = "The dense model: KL divergence and top-1 agreement on the same windows."
TASKS_HELP = "Separated by commas: names of lm-eval tasks, paper7, task YAMLs, FILE.jsonl of items."


def command(
    model: AnyModel,
    *,
    data: Annotated[str | None, typer.Option(help=DATA_HELP, metavar="SOURCE")] = None,
    length: Length = None,
    bos: Bos = "auto",
    skip_unreadable: SkipUnreadable = False,
    limit: Limit = None,
    protocol: Annotated[Literal["token", "word", "both"], typer.Option(help=PROTOCOL_HELP)] = "token",
    against: Annotated[str | None, typer.Option(help=AGAINST_HELP, metavar="MODEL")] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS_HELP, metavar="TASKS")] = None,
    few_shot: Annotated[
        int | None, typer.Option(help="Examples in a prompt of lm-eval; by default the task's own.", min=0)
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Only this many items of each task.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass; by default by size.", min=1)] = None,
    loading: Loading,
    report: Annotated[
        bool, typer.Option("--report", help="Add the result to the report and model card of the directory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Perplexity or accuracy on images, KL divergence and agreement with the dense model, and zero-shot accuracy."""
    from billhook.steps.evaluate import EvalConfig, evaluate_model

    config = EvalConfig(
        data=data, length=length, limit=limit, protocol=protocol, against=against, tasks=split_list(tasks),
        few_shot=few_shot, task_limit=task_limit, batch_size=batch_size, bos=bos, skip_unreadable=skip_unreadable,
        **loading.fields(model),
    )  # fmt: skip
    if report:
        _check_report(model)
    with progress("scoring") as advance:
        record = evaluate_model(model, config, advance)
    for line in lines(record):
        say(line)
    if report:
        from billhook.reports.publishing import add_evaluation

        add_evaluation(Path(model), record)
        say(f"Added to {model}/report.json, README.md and report.html.")
    if as_json:
        emit(record)


def _check_report(model: str) -> None:
    """Raise BillhookError, before any work, unless the directory has a report or can be given one."""
    from billhook.errors import BillhookError
    from billhook.reports.publishing import render
    from billhook.store.layout import RECORD, REPORT

    if not any((Path(model) / name).is_file() for name in (RECORD, REPORT)):
        raise BillhookError(f"--report: {model} is not a pruned directory: it has neither {REPORT} nor {RECORD}.")
    render(Path(model))


def lines(record: dict[str, Any]) -> list[str]:
    """The record as text, each number with its protocol."""
    if "inputs" in record:
        return _row_lines(record)
    found = []
    if "nll" in record:
        bits = "" if record["bits_per_byte"] is None else f", {record['bits_per_byte']:.4f} bits per byte"
        begun = " after BOS" if record["bos"] else ""
        size = f"{record['tokens']:,} tokens in {record['windows']} windows of {record['length']}{begun}{bits}"
        found.append(f"token perplexity {_ppl(record['token_ppl'])} ({size})")
    if (dense := record.get("against")) is not None:
        error = "" if dense["kl_error"] is None else f" +- {dense['kl_error']:.2g}"
        tail = f" (99 %: {dense['kl_99']:.3g}, 99.9 %: {dense['kl_999']:.3g})" if dense.get("kl_999") else ""
        kl = f"KL divergence {dense['kl']:.4f}{error} nats a token{tail}"
        agreement = f"top-1 agreement {100 * dense['top1_agreement']:.2f} %"
        found.append(f"against {dense['model']} (token perplexity {_ppl(dense['token_ppl'])}): {kl}, {agreement}")
    if (word := record.get("word")) is not None:
        size = f"{word['words']:,} words in {word['documents']} documents, windows of {word['length']}"
        bits = f"{word['bits_per_byte']:.4f} bits per byte"
        found.append(f"word perplexity {_ppl(word['word_ppl'])}, {bits} ({size}; lm-eval's protocol)")
    return found + [_task_line(task) for task in record.get("tasks", [])]


def _row_lines(record: dict[str, Any]) -> list[str]:
    """The record of images or other inputs as text."""
    from billhook.evaluation.scoring import each

    where, found = f"({record['inputs']} {record['unit']}s of {record['source']})", []
    words = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "exact_match": "exact match"}
    parts = [f"{words[key]} {_percent(record, key)}" for key in words if key in record]
    if parts:
        found.append(f"{', '.join(parts)}, negative log-likelihood {record['nll']:.4f} {where}")
    if (dense := record.get("against")) is None:
        return found or [f"no labels: give --against DENSE to compare with the dense model {where}"]
    own = [f" ({words[key]} {100 * dense[key]:.2f} %)" for key in ("top1", "exact_match") if key in dense]
    name = dense["model"] + "".join(own)
    key, what = ("cosine", "cosine of the embeddings") if "cosine" in dense else ("kl", "KL divergence")
    error = f" +- {dense[f'{key}_error']:.2g}" if dense.get(f"{key}_error") is not None else ""
    line = f"against {name}: {what} {dense[key]:.4f}{error}"
    if key == "kl":
        line += f" nats {each(record['unit'])}, top-1 agreement {100 * dense['top1_agreement']:.2f} %"
    return [*found, line]


def _percent(record: dict[str, Any], key: str) -> str:
    return f"{100 * record[key]:.2f} +- {100 * record[f'{key}_error']:.2f} %"


def _task_line(task: dict[str, Any]) -> str:
    norm = ""
    if task["acc_norm"] is not None:
        norm = f", acc_norm {100 * task['acc_norm']:.2f} +- {100 * (task['acc_norm_error'] or 0):.2f} %"
    error = "" if task["acc_error"] is None else f" +- {100 * task['acc_error']:.2f}"
    protocol = f"{task['items']} items, {task['few_shot']}, {task['scored_by']}"
    return f"{task['task']}: acc {100 * task['acc']:.2f}{error} %{norm} ({protocol})"


def _ppl(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.4f}"
