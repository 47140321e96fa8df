"""How much training what is left recovers of a real model, with about half an hour of processor time.

    python benchmarks/recover_real.py MODEL --documents c4.jsonl --data wikitext2_test_raw.txt [--only 50%]

The first 1,500 documents calibrate and train, the last 500 are scored: nothing of the evaluation is trained on. --data
is another text, on which transfer is seen. A model is pruned by the solver with the uniform allocation (32 windows of
512 tokens), or loses a fifth of the parameters of its blocks as channels, and `billhook recover` trains what is left;
the rate is chosen by races on held-out windows of the training documents. *Closed* is the share of the log-perplexity
above the dense model's that is gone. --tasks are files of zero-shot items, of which 300 are scored. Rows are added to
--rows as they come, and those that are there are not run again.
"""

import argparse
import json
import math
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from real_model import EVALUATION, billhook

TRAINING, HELD_OUT, ITEMS = 1500, 500, 300
PRUNED = ("prune", "--criterion", "admm", "--allocator", "uniform")
CASES = {
    "50%": [*PRUNED, "--sparsity", "0.5"],
    "60%": [*PRUNED, "--sparsity", "0.6"],
    "2:4": [*PRUNED, "--pattern", "2:4"],
    "20%, channels": ["slim", "--units", "channels", "--remove", "0.2"],
}
COLUMNS = ("removed", "text", "dense", "pruned", "KL", "top-1", "recovered", "KL", "top-1", "closed", "minutes")


def texts(options: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Path]]:
    """The training documents as a file, and the texts that are scored by name."""
    lines = options.documents.read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) < TRAINING + HELD_OUT:
        raise SystemExit(f"{options.documents} has {len(lines)} documents: {TRAINING + HELD_OUT} are needed.")
    training, held_out = folder / "training.jsonl", folder / "held_out.jsonl"
    training.write_text("".join(lines[:TRAINING]), encoding="utf-8")
    held_out.write_text("".join(lines[-HELD_OUT:]), encoding="utf-8")
    return training, {options.documents.stem: held_out, options.data.stem: options.data}


def scores(options: argparse.Namespace, model: Path, data: dict[str, Path]) -> dict[str, Any]:
    """Perplexity, KL divergence and agreement on every text, and the accuracy on every task with its error."""
    against = [] if model == options.model else ["--against", str(options.model)]
    found: dict[str, Any] = {"texts": {}, "tasks": {}}
    for name, source in data.items():
        result = billhook("eval", str(model), "--data", str(source), *EVALUATION, *against)[0]
        found["texts"][name] = {"perplexity": result["token_ppl"]}
        if against:
            found["texts"][name] |= {key: result["against"][key] for key in ("kl", "top1_agreement")}
    for file in options.tasks:
        result = billhook("eval", str(model), "--tasks", str(file), "--task-limit", str(ITEMS))[0]["tasks"][0]
        found["tasks"][file.stem] = {key: result[key] for key in ("acc", "acc_error")}
    return found


def measure(options: argparse.Namespace, case: str, dense: dict[str, Any]) -> dict[str, Any]:
    """Prune, score, recover and score again."""
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="billhook-recover.") as place:
        folder = Path(place)
        training, data = texts(options, folder)
        pruned, better = folder / "pruned", folder / "better"
        text = ["--calibration", str(training), "--length", "512"]
        command, *how = CASES[case]
        billhook(command, str(options.model), *how, *text, "--samples", "32", "--output", str(pruned))
        before = scores(options, pruned, data)
        words = [*text, "--teacher", str(options.model), "--tokens", str(options.tokens), "--output", str(better)]
        _, minutes, memory = billhook("recover", str(pruned), *words)
        after = scores(options, better, data)
    return {"before": before, "after": after, "dense": dense, "minutes": minutes, "memory": memory}


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each row and text, then one for each task."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in rows:
        for name, dense in row["dense"]["texts"].items():
            before, after = row["before"]["texts"][name], row["after"]["texts"][name]
            base, start, end = (math.log(one["perplexity"]) for one in (dense, before, after))
            near = [
                f"{one['perplexity']:.2f} | {one['kl']:.3f} | {one['top1_agreement']:.1%}" for one in (before, after)
            ]
            closed, head = (start - end) / (start - base), f"{row['case']} | {name} | {dense['perplexity']:.2f}"
            lines.append(f"| {head} | {' | '.join(near)} | {closed:.0%} | {row['minutes']:.0f} |")
        for name in row["dense"]["tasks"]:
            three = [row[key]["tasks"][name] for key in ("dense", "before", "after")]
            shown = " | ".join(f"{100 * one['acc']:.1f} ± {100 * one['acc_error']:.1f}" for one in three)
            lines.append(f"{row['case']}, {name}: dense, pruned, recovered: {shown}")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--documents", type=Path, required=True, help="FILE.jsonl of documents, such as C4's")
    parser.add_argument("--data", type=Path, required=True, help="another text, such as WikiText-2's raw test text")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="FILE.jsonl of zero-shot items")
    parser.add_argument("--tokens", type=int, default=61_440)
    parser.add_argument("--only", choices=list(CASES), action="append", help="only these (default all)")
    parser.add_argument("--rows", type=Path, default=Path("build/recover_real.jsonl"), help="rows that are finished")
    parser.add_argument("--scratch", type=Path, help="where models are written and deleted")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.rows.read_text("utf-8").splitlines()] if options.rows.exists() else []
    for case in options.only or CASES:
        about = {"case": case, "model": options.model.resolve().name, "tokens": options.tokens}
        if any(about.items() <= row.items() for row in rows):
            continue
        with tempfile.TemporaryDirectory(dir=options.scratch) as place:
            dense = rows[0]["dense"] if rows else scores(options, options.model, texts(options, Path(place))[1])
        rows.append(about | {"date": date.today().isoformat()} | measure(options, case, dense))
        with options.rows.open("a", encoding="utf-8") as file:
            print(json.dumps(rows[-1]), file=file, flush=True)
        print(markdown(rows[-1:]), flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    main()
