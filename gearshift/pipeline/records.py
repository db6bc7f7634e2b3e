"""The held-out records in a folder, `<policy>.json` each, and their comparison. It must not import
an engine or a trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gearshift.errors import StorageError
from gearshift.pipeline.recipe import POLICIES
from gearshift.rollouts.evaluate import Comparison, compare, span, value_of
from gearshift.runtime.digests import read_sealed
from gearshift.runtime.terminal import counted

Record = dict[str, Any]
"""An `Evaluation`'s summary, its samples, and the seconds that it took."""
_KEYS = ("metric", "value", "interval", "n", "episodes", "failures", "left_out", "samples")
_FAILED = "(the environment failed)"


def records(folder: Path) -> dict[str, Record]:
    """The records in a folder, in the order of the stages, other policies after them."""
    found = {path.stem: read_record(path) for path in folder.glob("*.json")}
    order = ["base", *POLICIES]
    names = sorted(found, key=lambda n: (order.index(n) if n in order else len(order), n))
    return {name: found[name] for name in names}


def read_record(path: Path) -> Record:
    """A policy's held-out record. Raises `StorageError` if it is broken."""
    way_out = "delete it: `gearshift eval` makes it again."
    record = read_sealed(path, way_out)
    if missing := [key for key in _KEYS if key not in record]:
        raise StorageError(f"{path} is no held-out record (it has no `{missing[0]}`); {way_out}")
    return record


def format_record(record: Record) -> str:
    """The figure as text: `chrf 0.412 [0.395, 0.430] of 256 problems`."""
    episodes = (
        "" if record["episodes"] == record["n"] else f" in {counted(record['episodes'], 'episode')}"
    )
    failed = f", {record['failures']} failed" if record["failures"] else ""
    if record["left_out"]:
        failed += f"; {counted(record['left_out'], 'row')} left out as trained on"
    return (
        f"{record['metric']} {record['value']:.3f} {span(record['interval'])} of "
        f"{counted(record['n'], 'problem')}{episodes}{failed}"
    )


def comparisons(found: Mapping[str, Record]) -> list[Comparison]:
    """Compare each policy with the one before it, and the last with the first."""
    names = list(found)
    pairs = [*pairwise(names)]
    if len(names) > 2:
        pairs.append((names[0], names[-1]))
    return [
        compare(
            (before, found[before]["samples"]),
            (after, found[after]["samples"]),
            found[after]["metric"],
        )
        for before, after in pairs
    ]


def changed(
    before: Record, after: Record, rows: Sequence[int], count: int
) -> Iterator[tuple[str, str, str]]:
    """(prompt, the answer before, the answer after) of these rows, the greatest changes first."""
    first = {s["row"]: s for s in before["samples"]}
    second = {s["row"]: s for s in after["samples"]}
    metric = after["metric"]

    def change(row: int) -> float:
        return abs(value_of(second[row], metric) - value_of(first[row], metric))

    for row in sorted(rows, key=change, reverse=True)[:count]:
        one, other = first[row], second[row]
        texts = [_FAILED if s["failed"] else s["completion"] for s in (one, other)]
        yield one["prompt"] or other["prompt"], texts[0], texts[1]
