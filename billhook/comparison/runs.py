"""Finished runs side by side: pruned directories with evaluations in their report.json, and comparisons.

Only comparable numbers are compared: of the same windows (by digest), length, protocol and versions. Otherwise the
error names what differs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billhook.comparison.record import RECORD, SCORES, load_comparison, method
from billhook.errors import BillhookError
from billhook.reports.report import load_report
from billhook.store.files import untrusted
from billhook.store.layout import REPORT
from billhook.store.typed_json import typed

_ROW: dict[str, Any] = {"protocol": str, "source": str, "digest": str, "length": int, "windows": int}
_ROW |= {"versions": dict[str, str], "model": str, "method": str, "pattern": str, "sparsity": float, "nll": float}
_ROW |= {"token_ppl": float | None, "dense_token_ppl": float | None}
_SAME = {
    "protocol": "protocol",
    "digest": "windows (text)",
    "length": "window lengths",
    "windows": "numbers of windows",
}


def compare_runs(folders: Sequence[Path]) -> dict[str, Any]:
    """Rows of all runs, best first, and what they have in common.

    Of several texts on which a pruned directory was scored, the first one that all runs share is used. Raises
    BillhookError where there is none.
    """
    found = {str(folder): _evaluations(folder) for folder in folders}
    shared = set.intersection(*({_key(row) for row in rows} for rows in found.values()))
    common = next((key for key in map(_key, next(iter(found.values()))) if key in shared), None)
    if common is None:
        raise BillhookError(_difference(found))
    rows = [row for evaluations in found.values() for row in evaluations if _key(row) == common]
    data = {key: rows[0][key] for key in ("source", "digest", "windows", "length")}
    shown: tuple[str, ...] = ("run", "model", "method", "pattern", "sparsity", "token_ppl", "nll", "dense_token_ppl")
    shown += tuple(key for key in SCORES if all(key in row for row in rows))
    ranked = [{key: row[key] for key in shown} for row in sorted(rows, key=lambda row: row["nll"])]
    return {"protocol": rows[0]["protocol"], "data": data, "versions": rows[0]["versions"], "runs": ranked}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row[key] for key in _SAME), tuple(sorted(row["versions"].items())))


def _difference(found: dict[str, list[dict[str, Any]]]) -> str:
    """A message about why the runs cannot be compared."""
    (one, a), *others = found.items()
    two, b = next(((name, rows) for name, rows in others if not {*map(_key, a)} & {*map(_key, rows)}), others[0])
    left, right = a[0], b[0]
    start = f"{one} and {two} cannot be compared:"
    if None not in (left["bos"], right["bos"]) and left["bos"] != right["bos"]:
        return f"{start} only in one, windows begin with a BOS token. Score both with the same --bos."
    for key, words in _SAME.items():
        if left[key] != right[key]:
            shown = "source" if key == "digest" else key
            values = f"{left[shown]} and {right[shown]}"
            return f"{start} their {words} differ ({values}). Score both in the same way with billhook eval."
    names, old, new = {**left["versions"], **right["versions"]}, left["versions"], right["versions"]
    name = next((n for n in names if old.get(n) != new.get(n)), "billhook")
    return (
        f"{start} they were scored with different versions of {name} ({old.get(name)} and {new.get(name)}). Score both "
        "again."
    )


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """Every score of a run, with everything it depends on."""
    name = next((name for name in (RECORD, REPORT) if (folder / name).is_file()), None)
    if name is None:
        raise BillhookError(
            f"{folder} holds no finished run: neither {RECORD} (billhook compare) nor {REPORT} (billhook prune)."
        )
    with untrusted(f"{folder / name} is damaged", "Make it again."):
        rows = _of_comparison(folder) if name == RECORD else _of_report(folder)
    return [typed(_ROW, row, f"{folder / name} is damaged") for row in rows]


def _of_comparison(folder: Path) -> list[dict[str, Any]]:
    found = load_comparison(folder)
    if not found.cells:
        raise BillhookError(f"{folder} is a comparison without a finished cell: run billhook compare again.")
    same = {"protocol": found.identity["protocol"], **found.identity["data"], "versions": found.identity["versions"]}
    same |= {"model": found.identity["model"]["name"], "dense_token_ppl": found.dense.get("token_ppl")}
    keys = ("pattern", "sparsity", "token_ppl", "nll")
    return [
        {
            "bos": None,
            **same,
            **{key: row[key] for key in (*keys, *SCORES) if key in row},
            "run": folder.name,
            "method": f"{method(row)}, seed {row['seed']}",
        }
        for row in found.cells
    ]


def _of_rows(entry: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of images or other inputs with the keys of one of windows."""
    return {**entry, "windows": entry["inputs"], "length": 1, "token_ppl": None} if "inputs" in entry else entry


def _of_report(folder: Path) -> list[dict[str, Any]]:
    report = load_report(folder)
    scored = [_of_rows(entry) for entry in report["evaluations"] if "nll" in entry]
    if not scored:
        raise BillhookError(
            f"{folder} has no evaluation in its report: score it with billhook eval {folder} --data SOURCE --report."
        )
    target = report["asked"]
    same = {
        "run": folder.name,
        "model": report["model"]["name"],
        "method": method(target),
        "pattern": target["pattern"],
    }
    same["sparsity"] = report["achieved"]["sparsity"]
    keys = ("protocol", "source", "digest", "windows", "length", "versions", "token_ppl", "nll", *SCORES)
    return [
        {
            **same,
            **{key: entry[key] for key in keys if key in entry},
            "bos": entry.get("bos"),
            "dense_token_ppl": (entry.get("against") or {}).get("token_ppl"),
        }
        for entry in scored
    ]
