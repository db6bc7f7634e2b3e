"""Held-out evaluation: every row once, greedily; how often the episode succeeded, and what was
written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gearshift.errors import DataError
from gearshift.rollouts.collector import Collector, Start
from gearshift.types import SamplingParams, Trajectory


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one policy did on the held-out rows."""

    n: int
    """Episodes that ran to their end."""
    success: float
    """Fraction of them that the environment calls a success (`info["success"]`)."""
    reward: float
    """Their mean return."""
    mean_length: float
    """Mean tokens that the policy wrote."""
    samples: list[dict[str, Any]]
    """One record an episode: row, prompt, completion, reward, success, gold."""

    def summary(self) -> dict[str, float]:
        """The figures without the samples."""
        return {
            "n": self.n,
            "success": self.success,
            "reward": self.reward,
            "mean_length": self.mean_length,
        }


def evaluate(
    collector: Collector,
    rows: int,
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda episodes, tokens: None,
    at_once: int = 64,
) -> Evaluation:
    """Run rows 0 .. `rows`-1 greedily, `at_once` together; `progress` hears the episodes and tokens
    of each batch.

    Raises `DataError` if no episode came to its end.
    """
    done: list[Trajectory] = []
    for first in range(0, rows, at_once):
        starts = [Start(row, seed=row, row=row) for row in range(first, min(rows, first + at_once))]
        ended = collector.collect(
            starts, SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        )
        done += ended
        progress(len(starts), sum(sum(t.loss_mask) for t in ended))
    if not done:
        raise DataError(
            f"No held-out episode came to its end; the last failure: {collector.last_failure}."
        )
    samples = [
        {
            "row": t.group_id,
            "prompt": next((m["content"] for m in t.info["messages"] if m["role"] == "user"), ""),
            "completion": t.info["completion"],
            "reward": t.reward,
            "success": bool(t.info.get("success", False)),
            "gold": t.info.get("gold"),
        }
        for t in done
    ]
    return Evaluation(
        n=len(done),
        success=fmean(s["success"] for s in samples),
        reward=fmean(t.reward for t in done),
        mean_length=fmean(sum(t.loss_mask) for t in done),
        samples=samples,
    )
