"""Finished runs side by side: pruned directories with evaluations in their report.json, and comparisons.

Numbers are compared only where that is fair: scored on the same windows (by digest), with the same length, protocol and
versions. Otherwise the error names what differs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billhook.comparison.record import RECORD, load_comparison, method
from billhook.errors import BillhookError
from billhook.reports.report import load_report
from billhook.store.layout import REPORT

_SAME = {
    "protocol": "protocol",
    "digest": "windows (text)",
    "length": "length of a window",
    "windows": "number of windows",
}


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Rows of all runs, best first, with what they have in common; raises BillhookError where nothing is comparable.

    Where a pruned directory was scored on several texts, the first one that every run was scored on is used.
    """
    found = {str(folder): _evaluations(folder) for folder in folders}
    common = [
        _key(e)
        for e in next(iter(found.values()))
        if all(any(_key(o) == _key(e) for o in others) for others in found.values())
    ]
    if not common:
        raise BillhookError(_difference(found))
    rows = [row for evaluations in found.values() for row in evaluations if _key(row) == common[0]]
    first = rows[0]
    data = {key: first[key] for key in ("source", "digest", "windows", "length")}
    shown = ("run", "model", "method", "pattern", "sparsity", "token_ppl", "nll", "dense_token_ppl")
    ranked = sorted(rows, key=lambda row: row["nll"])
    return {
        "protocol": first["protocol"],
        "data": data,
        "versions": first["versions"],
        "runs": [{k: r[k] for k in shown} for r in ranked],
    }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row[key] for key in _SAME), tuple(sorted(row["versions"].items())))


def _difference(found: dict[str, list[dict[str, Any]]]) -> str:
    """Why the runs cannot be compared, in words."""
    (one, a), *others = found.items()
    two, b = next((name, rows) for name, rows in others if not {*map(_key, a)} & {*map(_key, rows)})
    left, right = a[0], b[0]
    for key, words in _SAME.items():
        if left[key] != right[key]:
            was = f"{left['source']} and {right['source']}" if key == "digest" else f"{left[key]} and {right[key]}"
            return (
                f"{one} and {two} cannot be compared: their {words} differ ({was}). Score both in the same way "
                "with billhook eval."
            )
    name = next(
        n for n in {**left["versions"], **right["versions"]} if left["versions"].get(n) != right["versions"].get(n)
    )
    was = f"{left['versions'].get(name)} and {right['versions'].get(name)}"
    return (
        f"{one} and {two} cannot be compared: they were scored with different versions of {name} ({was}). Score both "
        "again."
    )


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every score of a run, with what it depends on."""
    if (folder / RECORD).is_file():
        return _of_comparison(folder)
    if (folder / REPORT).is_file():
        return _of_report(folder)
    raise BillhookError(
        f"{folder} holds no finished run: neither {RECORD} (billhook compare) nor {REPORT} (billhook prune)."
    )


def _of_comparison(folder: Path) -> list[dict[str, Any]]:
    found = load_comparison(folder)
    if not found.cells:
        raise BillhookError(f"{folder} is a comparison without a finished cell: run billhook compare again.")
    same = {"protocol": found.identity["protocol"], **found.identity["data"], "versions": found.identity["versions"]}
    same |= {"model": found.identity["model"]["name"], "dense_token_ppl": found.dense.get("token_ppl")}
    keys = ("pattern", "sparsity", "token_ppl", "nll")
    return [
        {**same, **{key: row[key] for key in keys}, "run": folder.name, "method": f"{method(row)}, seed {row['seed']}"}
        for row in found.cells
    ]


def _of_report(folder: Path) -> list[dict[str, Any]]:
    report = load_report(folder)
    scored = [entry for entry in report["evaluations"] if "nll" in entry]
    if not scored:
        raise BillhookError(
            f"{folder} has no evaluation in its report: score it with billhook eval {folder} --data SOURCE --report."
        )
    asked = report["asked"]
    same = {
        "run": folder.name,
        "model": report["model"]["name"],
        "method": f"{asked['criterion']} + {asked['allocator']}",
    }
    same |= {"pattern": asked["pattern"], "sparsity": report["achieved"]["sparsity"]}
    keys = ("protocol", "source", "digest", "windows", "length", "versions", "token_ppl", "nll")
    return [
        {**same, **{key: entry[key] for key in keys}, "dense_token_ppl": (entry.get("against") or {}).get("token_ppl")}
        for entry in scored
    ]
