"""A model directory pruned by the published methods and by Billhook's recipes: perplexity, agreement, time and memory.

    python benchmarks/real_model.py MODEL --calibration c4.jsonl --data wikitext2_test_raw.txt --rows rows.jsonl
    python benchmarks/real_model.py MODEL ... --method dense --method wanda --removed 50%      only these
    python benchmarks/real_model.py MODEL ... --method none                                    only the table
    python benchmarks/real_model.py MODEL ... --table units                                    whole units instead

Every row is `billhook prune`, or `slim` for whole units, and then `billhook eval --against MODEL`, each in its own
process, in float32: `time` is the processor time of the first, its check on held-out text included (other busy
processes disturb it less than the clock), and `memory` its largest resident set. Rows are added to --rows as they come,
and those that are there are not run again. Calibration is 32 windows of 512 tokens, evaluation the first 16 windows of
1024; nothing is chosen on the evaluation text. The allocation methods have no published form for 2:4, so those cells
stay empty.
`tools/get_real_model.py` makes model directories.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

CALIBRATION = ("--samples", "32", "--length", "512", "--seed", "0", "--bos", "auto")
EVALUATION = ("--limit", "16", "--length", "1024", "--bos", "auto")
METHODS = {  # cheapest first
    "magnitude": ["--criterion", "magnitude", "--allocator", "uniform"],
    **{name: ["--recipe", name] for name in ("wanda", "alphapruning", "atp", "owl", "sparsegpt", "gblm")},
    "admm": ["--criterion", "admm", "--allocator", "uniform"],
    "fast": ["--recipe", "fast"],
    "good": ["--recipe", "good"],
}
REMOVED = {"50%": ["--sparsity", "0.5"], "60%": ["--sparsity", "0.6"], "2:4": ["--pattern", "2:4"]}
UNDEFINED = [(method, "2:4") for method in ("alphapruning", "atp", "owl")]
BY_PART = {name: ["--method", name] for name in ("magnitude", "wanda_sp", "taylor", "obs")}
BY_BLOCK = {  # ShortGPT changes no weights of the blocks that stay
    "angular": ["--drop-by", "angular", "--method", "wanda_sp"],
    "kl, not refitted": ["--drop-by", "kl", "--method", "wanda_sp"],
    "kl": ["--drop-by", "kl"],
}
# one of the three key/value heads of SmolLM2-135M, with its query heads, is 8.3 % of a block's parameters
UNITS: dict[str, tuple[dict[str, list[str]], list[str]]] = {
    "20%, channels": (BY_PART, ["--units", "channels", "--remove", "0.2"]),
    "20%, channels and heads": (BY_PART, ["--units", "channels,heads", "--remove", "0.2"]),
    "8.3%, heads": (BY_PART, ["--units", "heads", "--remove", "0.0833"]),
    "20%, blocks": (BY_BLOCK, ["--units", "blocks", "--remove", "0.2"]),
    "20%, auto": ({"auto": []}, ["--units", "auto", "--remove", "0.2"]),
}
Cells = dict[tuple[str, str], list[str]]  # the options of a run, by method and what is removed
_DENSE: Cells = {("dense", ""): []}
TABLES: dict[str, tuple[str, Cells]] = {
    "weights": (
        "prune",
        _DENSE | {(name, part): [*METHODS[name], *REMOVED[part]] for part in REMOVED for name in METHODS},
    ),
    "units": (
        "slim",
        _DENSE | {(name, part): [*how[name], *share] for part, (how, share) in UNITS.items() for name in how},
    ),
}
COLUMNS = ("method", "removed", "perplexity", "top-1", "KL", "time, minutes", "memory, GiB")


def billhook(*arguments: str) -> tuple[dict[str, Any], float, float]:
    """The JSON result of a command, its processor time in minutes and its largest resident set in GiB."""
    command = [sys.executable, "-m", "billhook", *arguments, "--dtype", "float32", "--device", "cpu", "--json"]
    with tempfile.TemporaryFile("w+") as answer:
        child = subprocess.Popen(command, stdout=answer)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {child.returncode}")
        answer.seek(0)
        return json.load(answer), (used.ru_utime + used.ru_stime) / 60, used.ru_maxrss / 2**20


def measure(options: argparse.Namespace, method: str, removed: str) -> dict[str, Any]:
    """Prune and score by one method; the dense model is only scored."""
    score = ["--data", str(options.data), *EVALUATION]
    if method == "dense":
        found = billhook("eval", str(options.model), *score)[0]
        return {"perplexity": found["token_ppl"]}
    command, cells = TABLES[options.table]
    with tempfile.TemporaryDirectory(dir=options.scratch, prefix="billhook-real.") as folder:
        text = ["--calibration", str(options.calibration), *CALIBRATION]
        _, minutes, memory = billhook(
            command, str(options.model), *cells[method, removed], *text, "--output", f"{folder}/pruned"
        )
        found = billhook("eval", f"{folder}/pruned", *score, "--against", str(options.model))[0]
    near = {"top_1": found["against"]["top1_agreement"], "kl": found["against"]["kl"]}
    return {"perplexity": found["token_ppl"], **near, "minutes": minutes, "memory": memory}


def read(path: Path, identity: dict[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a file that were measured on the same model and texts, by method and what was removed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["identity"] == identity]
    return {(row["method"], row["removed"]): row for row in rows}


def markdown(rows: dict[tuple[str, str], dict[str, Any]], cells: Cells) -> str:
    """The table in the order of `cells`, the dense model first; what was not measured is left out."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    forms = {"perplexity": ".2f", "top_1": ".1%", "kl": ".3f", "minutes": ".1f", "memory": ".2f"}
    for key in cells:
        if key in rows:
            values = [format(rows[key][name], form) if name in rows[key] else "" for name, form in forms.items()]
            lines.append(f"| {' | '.join([*key, *values])} |")
    return "\n".join(lines)


def main() -> None:
    """Run the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="text to calibrate on, such as C4")
    parser.add_argument("--data", type=Path, required=True, help="text to score, such as WikiText-2's raw test text")
    parser.add_argument("--rows", type=Path, default=Path("build/real_model.jsonl"), help="rows that are finished")
    parser.add_argument("--table", choices=list(TABLES), default="weights", help="what is removed")
    parser.add_argument("--method", action="append", help="only these (default all), or none")
    parser.add_argument("--removed", choices=[*REMOVED, *UNITS], action="append", help="only these (default all)")
    parser.add_argument("--scratch", type=Path, help="where pruned models are written and deleted")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    cells = TABLES[options.table][1]
    identity = {key: getattr(options, key).resolve().name for key in ("model", "calibration", "data")}
    rows = read(options.rows, identity)
    for key in cells:
        asked = key[0] in (options.method or [key[0]]) and key[1] in ["", *(options.removed or [key[1]])]
        if asked and key not in rows and key not in UNDEFINED:
            print(*key, file=sys.stderr, flush=True)
            found = measure(options, *key)
            about = {"method": key[0], "removed": key[1], "date": date.today().isoformat(), "identity": identity}
            rows[key] = about | found
            with options.rows.open("a", encoding="utf-8") as file:
                print(json.dumps(rows[key]), file=file, flush=True)
    print(markdown(rows, cells))


if __name__ == "__main__":
    main()
