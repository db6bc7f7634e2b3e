"""Held-out evaluation: every row once, greedily; what the episodes came to, with its uncertainty.

A figure here is a mean over episodes with a 95% interval, and two policies are compared row by
row: the same rows, so that the rows' own difficulty drops out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from gearshift.errors import ConfigError, DataError
from gearshift.rollouts.collector import Collector, Start
from gearshift.types import SamplingParams, Trajectory

Interval = tuple[float, float]

Sample = dict[str, Any]
"""One episode: row, messages, prompt, completion, reward, success, gold, metrics."""

HELDOUT_SEED = 1 << 30
"""Where the seeds of held-out episodes begin, in environments that have no rows."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one policy did on the held-out rows."""

    metric: str
    """The figure that policies are compared by."""
    value: float
    """Its mean over the episodes."""
    interval: Interval
    """95%, of that mean."""
    n: int
    """Episodes that ran to their end."""
    failures: int
    """Episodes that their environment failed; they are in no figure."""
    figures: dict[str, float]
    """Means over the episodes: `success`, `reward`, `mean_length` in tokens, the environment's
    own metrics, and the task's figures of the whole corpus."""
    samples: list[Sample]
    """One record an episode."""

    def summary(self) -> dict[str, Any]:
        """The figures without the samples."""
        return {
            "metric": self.metric,
            "value": self.value,
            "interval": list(self.interval),
            "n": self.n,
            "failures": self.failures,
            **self.figures,
        }


def evaluate(
    collector: Collector,
    episodes: int,
    max_new_tokens: int,
    *,
    by_row: bool = True,
    metric: str = "success",
    corpus: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]] | None = None,
    progress: Callable[[int, int], None] = lambda episodes, tokens: None,
    at_once: int = 64,
) -> Evaluation:
    """Run `episodes` greedily, `at_once` together: rows 0, 1, ..., or, where the environment has
    no rows, seeds that training does not use. `progress` hears the episodes and tokens of each
    batch.

    Raises `DataError` if no episode came to its end, `ConfigError` if one lacks the metric.
    """
    done: list[Trajectory] = []
    failed = collector.failures
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    for first in range(0, episodes, at_once):
        starts = [
            Start(i, seed=HELDOUT_SEED + i, row=i if by_row else None)
            for i in range(first, min(episodes, first + at_once))
        ]
        ended = collector.collect(starts, params)
        done += ended
        progress(len(starts), sum(sum(t.loss_mask) for t in ended))
    if not done:
        raise DataError(
            f"No held-out episode came to its end; the last failure: {collector.last_failure}."
        )
    samples = [sample(t) for t in done]
    values = [value_of(s, metric) for s in samples]
    names = [n for n in samples[0]["metrics"] if all(n in s["metrics"] for s in samples)]
    figures = {
        "success": fmean(s["success"] for s in samples),
        "reward": fmean(s["reward"] for s in samples),
        "mean_length": fmean(sum(t.loss_mask) for t in done),
        **{name: fmean(s["metrics"][name] for s in samples) for name in names},
        **(corpus(samples) if corpus else {}),
    }
    return Evaluation(
        metric=metric,
        value=fmean(values),
        interval=interval(values),
        n=len(done),
        failures=collector.failures - failed,
        figures=figures,
        samples=samples,
    )


def sample(trajectory: Trajectory) -> Sample:
    """The record of an episode. Of several turns, the whole conversation is its completion."""
    messages = trajectory.info["messages"]
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    completion = trajectory.info["completion"]
    if len(said) > 1:
        completion = "\n".join(f"{m['role']}: {m['content']}" for m in messages[said[0] :])
    return {
        "row": trajectory.group_id,
        "messages": messages,
        "prompt": next((m["content"] for m in messages if m["role"] == "user"), ""),
        "completion": completion,
        "reward": trajectory.reward,
        "success": bool(trajectory.info.get("success", False)),
        "gold": trajectory.info.get("gold"),
        "metrics": dict(trajectory.info.get("metrics", {})),
    }


def value_of(sample: Mapping[str, Any], metric: str) -> float:
    """The episode's figure of this name. Raises `ConfigError` if it has none."""
    if metric in ("success", "reward"):
        return float(sample[metric])
    if metric not in sample["metrics"]:
        raise ConfigError(
            f"An episode has no `{metric}`; it has success, reward"
            f"{''.join(f', {name}' for name in sample['metrics'])}."
        )
    return float(sample["metrics"][metric])


def interval(values: Sequence[float]) -> Interval:
    """The 95% interval of the mean: Wilson's (1927) where all values are 0 or 1, which is sound
    near both ends; else the percentile bootstrap (Efron 1979) from a fixed seed.
    """
    x_N = np.asarray(values, dtype=np.float64)
    if np.isin(x_N, (0.0, 1.0)).all():
        return wilson(float(x_N.mean()), len(x_N))
    return bootstrap(values)


def bootstrap(values: Sequence[float], resamples: int = 4000) -> Interval:
    """The 95% percentile interval of the mean, from a fixed seed."""
    x_N = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    means = x_N[rng.integers(len(x_N), size=(resamples, len(x_N)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def wilson(rate: float, n: int, z: float = 1.96) -> Interval:
    """The 95% interval of a rate seen in n trials.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    """
    middle = rate + z * z / (2 * n)
    half = z * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))
    scale = 1 + z * z / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One policy against another on the rows that both have."""

    before: str
    """The one's name."""
    after: str
    """The other's."""
    difference: float
    """Mean of the other's figure less the one's."""
    interval: Interval
    """95%, by bootstrap over rows; it leaves out 0 where the difference can be told from noise."""
    wins: list[int]
    """Rows where the other is better."""
    losses: list[int]
    """Rows where it is worse."""

    def summary(self) -> dict[str, Any]:
        """The figures, rows counted."""
        return {
            "before": self.before,
            "after": self.after,
            "difference": self.difference,
            "interval": list(self.interval),
            "better": len(self.wins),
            "worse": len(self.losses),
        }


def compare(
    before: tuple[str, Sequence[Sample]], after: tuple[str, Sequence[Sample]], metric: str
) -> Comparison:
    """`after` less `before`, each a name and its samples, row by row. Raises `DataError` if they
    share no row.
    """
    first, second = ({s["row"]: value_of(s, metric) for s in side[1]} for side in (before, after))
    changes = {row: second[row] - first[row] for row in first if row in second}
    if not changes:
        raise DataError(
            f"{before[0]} and {after[0]} were evaluated on no common row; "
            "evaluate both on the same recipe."
        )
    return Comparison(
        before[0],
        after[0],
        fmean(changes.values()),
        bootstrap(list(changes.values())),
        [row for row, change in changes.items() if change > 0],
        [row for row, change in changes.items() if change < 0],
    )
