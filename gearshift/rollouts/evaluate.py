"""Held-out evaluation: every row runs once, greedily; the figures of the episodes come with
intervals.

A figure here is a mean over episodes with a 95% interval, and two policies are compared row by
row: the same rows, so that the rows' own difficulty drops out. Rows of one template or prompt are
one problem (see `intervals`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from gearshift.data.overlap import prompt_text
from gearshift.errors import ConfigError, DataError
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.rollouts.intervals import (
    Interval,
    interval,
    interval_of_change,
    merged,
    sign_flip,
)
from gearshift.runtime.terminal import counted
from gearshift.types import SamplingParams, Trajectory

Split = Literal["validation", "test"]
SPLITS: tuple[Split, ...] = ("validation", "test")
"""The split by which settings are chosen, and the split that is evaluated once at the end."""

Scorer = Callable[[Sequence[Trajectory]], tuple[Iterable[Trajectory | None], str]]
"""Episodes -> the episodes with their rewards, None for one that gets none; and why the last of
those gets none."""
Sample = dict[str, Any]
"""One episode: row, problem, messages, prompt, completion, its tokens (in `loss_mask` 1 for those
that the policy sampled), reward, success, failed, gold, metrics.
"""

SEEDS: dict[Split, int] = {"validation": 1 << 31, "test": 3 << 30}
"""Where the seeds of held-out episodes begin. Those of training are less."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The results of one policy on the held-out rows."""

    metric: str
    """The figure that policies are compared by."""
    value: float
    """The mean of this figure over the episodes."""
    interval: Interval
    """The 95% interval of that mean."""
    n: int
    """Distinct problems among the episodes of the figure: rows that share a template or a prompt
    are one."""
    episodes: int
    """The number of episodes that were begun."""
    failures: int
    """The number of episodes whose environment failed. They count as no success, and in no other
    figure.
    """
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
            "interval": finite(self.interval),
            "n": self.n,
            "episodes": self.episodes,
            "failures": self.failures,
            **self.figures,
        }


def starts_of(split: Split, count: int, rows: Sequence[int] | None = None) -> list[EpisodeSpec]:
    """The starts of a split's episodes: one for each of these rows, or (None) `count` starts that
    differ only in their seed.
    """
    if rows is None:
        return [EpisodeSpec(i, SEEDS[split] + i) for i in range(count)]
    return [EpisodeSpec(row, SEEDS[split] + row, row) for row in rows]


def evaluate(
    collector: Collector,
    starts: Sequence[EpisodeSpec],
    max_new_tokens: int,
    *,
    problems: Mapping[int, Hashable] | None = None,
    metric: str = "success",
    corpus: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]] | None = None,
    progress: Callable[[int, int], None] = lambda episodes, tokens: None,
    at_once: int = 64,
    score: Scorer | None = None,
) -> Evaluation:
    """Run an episode from each start greedily, `at_once` together. `problems` names the problem of
    each start's group; where it is not given, episodes are one problem if they start from one row
    of the environment's, or from equal messages. `progress` gets the episodes and tokens of each
    batch. `score` gives the rewards where the environment has none.

    Raises `DataError` if every episode failed, `ConfigError` if one lacks the metric.
    """
    samples: list[Sample] = []
    lost, why = Counter[str](), dict[str, str]()
    params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
    for first in range(0, len(starts), at_once):
        portion = starts[first : first + at_once]
        ran_now = collector.collect(portion, params, rewarded="any" if score else "needed")
        scored, reason = score(ran_now) if score else (ran_now, "")
        ended = {t.group_id: t for t in scored if t is not None}
        samples += [
            sample(ended[s.group_id]) if s.group_id in ended else _failed(s.group_id)
            for s in portion
        ]
        for what, failed, last in (
            ("lost to the environment", len(portion) - len(ran_now), collector.last_failure),
            ("without a reward", len(ran_now) - len(ended), reason),
        ):
            if failed:
                lost[what], why[what] = lost[what] + failed, last.rstrip(".")
        progress(len(portion), sum(sum(t.loss_mask) for t in ended.values()))
    ran = [s for s in samples if not s["failed"]]
    if not ran:
        each = (f"{count} {what} (the last: {why[what]})" for what, count in lost.items())
        raise DataError(
            f"Every held-out episode failed: {', '.join(each)}; look at the environment and the "
            "rewards."
        )
    _name_problems(samples, problems)
    counted = [s for s in samples if has_value(s, metric)]
    values = [value_of(s, metric) for s in counted]
    clusters = [s["problem"] for s in counted]
    return Evaluation(
        metric=metric,
        value=fmean(values),
        interval=interval(values, clusters),
        n=len(set(clusters)),
        episodes=len(samples),
        failures=len(samples) - len(ran),
        figures=_figures(samples, ran) | (corpus(ran) if corpus else {}),
        samples=samples,
    )


def _figures(samples: list[Sample], ran: list[Sample]) -> dict[str, float]:
    """Means over the episodes; those in `ran` came to their end."""
    names = [n for n in ran[0]["metrics"] if all(n in s["metrics"] for s in ran)]
    return {
        "success": fmean(s["success"] for s in samples),
        "reward": fmean(s["reward"] for s in ran),
        "mean_length": fmean(sum(s["loss_mask"]) for s in ran),
        **{name: fmean(s["metrics"][name] for s in ran) for name in names},
    }


def sample(trajectory: Trajectory) -> Sample:
    """The record of an episode. Of several turns, the whole conversation is its completion."""
    info = trajectory.info
    messages = info.messages
    said = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    completion = info.completion
    if len(said) > 1:
        completion = "\n".join(f"{m['role']}: {m['content']}" for m in messages[said[0] :])
    return {
        "row": trajectory.group_id,
        "problem": prompt_text(messages[: said[0]]) if info.row is None else f"row {info.row}",
        "messages": messages,
        "prompt": next((m["content"] for m in messages if m["role"] == "user"), ""),
        "completion": completion,
        "token_ids": trajectory.token_ids,
        "loss_mask": trajectory.loss_mask,
        "reward": trajectory.reward,
        "success": info.success,
        "failed": False,
        "gold": json.loads(json.dumps(info.gold, default=str)),
        "metrics": info.metrics,
    }


def _failed(row: int) -> Sample:
    """The record of an episode that its environment failed."""
    nothing: Sample = {"messages": [], "prompt": "", "completion": "", "gold": None, "metrics": {}}
    own = f"episode {row}"  # the environment has not given its task
    return {
        "row": row, "problem": own, **nothing, "reward": None, "success": False, "failed": True,
    }  # fmt: skip


def _name_problems(samples: Sequence[Sample], problems: Mapping[int, Hashable] | None) -> None:
    """Write into each record the number of its problem, which is the problem's first row."""
    keys = [s["problem"] if problems is None else problems[s["row"]] for s in samples]
    first: dict[Hashable, int] = {}
    for record, key in zip(samples, keys, strict=True):
        record["problem"] = first.setdefault(key, record["row"])


def has_value(sample: Mapping[str, Any], metric: str) -> bool:
    """Whether the episode counts in this figure: one that failed is no success, and has no other
    figure.
    """
    return metric == "success" or not sample.get("failed", False)


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


def finite(span: Interval) -> list[float | None]:
    """An interval for JSON: an unknown end is null."""
    return [x if math.isfinite(x) else None for x in span]


def span(interval: Sequence[float | None], form: str = ".3f") -> str:
    """An interval as text: `[0.391, 0.656]`."""
    if None in interval:
        return "[not known: one problem only]"
    low, high = interval
    return f"[{low:{form}}, {high:{form}}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two policies on the rows that both have."""

    before: str
    """The name of the first policy."""
    after: str
    """The name of the second policy."""
    difference: float
    """The mean of the second policy's figure minus the first's."""
    interval: Interval
    """The 95% interval of the difference, by resampling problems."""
    p: float
    """The p-value: how often two equally good policies would differ at least this much by chance.
    """
    n: int
    """Distinct problems among the rows."""
    wins: list[int]
    """Rows where the second policy is better."""
    losses: list[int]
    """Rows where the second policy is worse."""

    @property
    def told_apart(self) -> bool:
        """Whether the difference is more than noise: p is below 0.05 and the interval leaves out
        0. Both, for each of them fails where few problems change.
        """
        return self.p < 0.05 and not self.interval[0] <= 0 <= self.interval[1]

    def summary(self) -> dict[str, Any]:
        """The figures, rows counted."""
        return {
            "before": self.before,
            "after": self.after,
            "difference": self.difference,
            "interval": finite(self.interval),
            "p": self.p,
            "told_apart": self.told_apart,
            "n": self.n,
            "better": len(self.wins),
            "worse": len(self.losses),
        }

    def __str__(self) -> str:
        apart = "" if self.told_apart else "; this may be chance"
        return (
            f"{self.before} -> {self.after}: {self.difference:+.3f} "
            f"{span(finite(self.interval), '+.3f')}, p = {self.p:.2g}; "
            f"{counted(len(self.wins), 'row')} better, {len(self.losses)} worse, "
            f"{counted(self.n, 'problem')}{apart}"
        )


def compare(
    before: tuple[str, Sequence[Sample]], after: tuple[str, Sequence[Sample]], metric: str
) -> Comparison:
    """Compare `after` with `before`, each a name and its samples, row by row. Rows are one problem
    if they are one problem in either of the two. Raises `DataError` if they share no row.
    """
    first, second = (
        {s["row"]: s for s in samples if has_value(s, metric)} for _, samples in (before, after)
    )
    rows = [row for row in first if row in second]
    if not rows:
        raise DataError(
            f"{before[0]} and {after[0]} were evaluated on no common row; "
            "evaluate both on the same recipe."
        )
    changes = [value_of(second[r], metric) - value_of(first[r], metric) for r in rows]
    problems = merged(
        [first[r].get("problem", r) for r in rows], [second[r].get("problem", r) for r in rows]
    )
    return Comparison(
        before[0],
        after[0],
        fmean(changes),
        interval_of_change(changes, problems),
        sign_flip(changes, problems),
        len(set(problems)),
        [row for row, change in zip(rows, changes, strict=True) if change > 0],
        [row for row, change in zip(rows, changes, strict=True) if change < 0],
    )
