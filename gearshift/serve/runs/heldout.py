"""The held-out figures of a run row by row, and the differences between recipes. It must not import
torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from gearshift.serve.runs.files import Record, RunFolder

_FIGURES = ("metric", "value", "interval", "n", "episodes", "failures", "left_out")
_ROWS = 100


def heldout(run: RunFolder, first: int = 0) -> Record:
    """The held-out table, the comparisons of the run's summary, and a page of rows: the answers of
    each policy with its figure, those that changed most from the first to the last policy first.
    """
    records = run.heldout()
    rows: dict[Any, Record] = {}
    for name, record in records.items():
        metric = record.get("metric")
        for sample in record.get("samples") or ():
            if not isinstance(sample, dict) or not isinstance(sample.get("row"), int | str):
                continue
            row = rows.setdefault(sample["row"], {"row": sample["row"], "policies": {}})
            for key in ("prompt", "gold"):
                row[key] = row.get(key) or sample.get(key)
            row["policies"][name] = {
                "answer": sample.get("completion"),
                "value": _value(sample, metric),
                "failed": bool(sample.get("failed")),
            }
    names = list(records)
    for row in rows.values():
        values = [row["policies"].get(n, {}).get("value") for n in (names[:1] + names[-1:])]
        known = len(values) == 2 and None not in values
        row["change"] = values[1] - values[0] if known else None
    ordered = sorted(rows.values(), key=lambda row: -abs(row["change"] or 0.0))
    compared = run.json("summary.json").get("heldout_compared")
    return {
        "policies": {n: {k: r.get(k) for k in _FIGURES} for n, r in records.items()},
        "compared": compared if isinstance(compared, list) else [],
        "better": sum((row["change"] or 0) > 0 for row in ordered),
        "worse": sum((row["change"] or 0) < 0 for row in ordered),
        "count": len(ordered),
        "rows": ordered[first : first + _ROWS],
    }


def _value(sample: Mapping[str, Any], metric: Any) -> float | None:
    metrics = sample.get("metrics")
    found = sample.get(metric) if metric in ("success", "reward") else None
    if found is None and isinstance(metrics, dict):
        found = metrics.get(metric)
    return float(found) if isinstance(found, int | float) else None


def recipe_differences(runs: Mapping[str, RunFolder]) -> Record:
    """The keys in which the recipes of these runs differ, with each run's value; `run.dir`, which
    always differs, is left out.
    """
    flat = {name: dict(_leaves(run.recipe())) for name, run in runs.items()}
    keys = dict.fromkeys(key for leaves in flat.values() for key in leaves)
    rows = [
        {"key": key, "values": [_shown(leaves.get(key)) for leaves in flat.values()]}
        for key in keys
        if key != "run.dir" and len({leaves.get(key) for leaves in flat.values()}) > 1
    ]
    return {"runs": list(flat), "keys": rows}


def _shown(value: str | None) -> str | None:
    """The value; of an absolute path only its end, because a page tells nothing of the machine."""
    parts = (value or "").strip('"').split("/")
    return value if parts[0] or len(parts) < 2 else f'"…/{parts[-1]}"'


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif key:
        yield key, json.dumps(tree, default=str)
