"""Which curves of a run are shown first, and the records of `metrics.jsonl` as columns. The report
and the run page read them here. It must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

CURVES = (
    ("Reward", ("reward", "rewards/*/mean")),
    ("Success", ("success",)),
    ("KL to the reference", ("kl",)),
    ("Entropy", ("entropy",)),
    ("Tokens in a completion", ("completions/mean_length",)),
    ("Completions cut short", ("completions/clipped_ratio",)),
    ("Loss", ("loss",)),
    ("Accuracy on pairs", ("accuracy",)),
    ("Margin of pairs", ("margin",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Trained tokens a second", ("speed/tokens_per_second",)),
    ("Model FLOPs utilisation", ("speed/mfu",)),
    ("Peak of the GPU's memory, GiB", ("memory/peak_gib/*",)),
)
"""Titles, and the patterns of the metrics' names under them."""

Columns = dict[str, list[float | None]]
"""For each metric one value a record; None where a record has no finite number."""


def columns(records: Iterable[Mapping[str, Any]]) -> Columns:
    """The numbers of the records by name, in the order in which the names first appear."""
    found: Columns = {}
    count = 0
    for record in records:
        for name, value in record.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            column = found.setdefault(name, [])
            column += [None] * (count - len(column))
            column.append(value if value is not None and math.isfinite(value) else None)
        count += 1
    for column in found.values():
        column += [None] * (count - len(column))
    return {name: column for name, column in found.items() if any(x is not None for x in column)}


def matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names under these patterns, in the patterns' order."""
    known = list(names)
    return [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
