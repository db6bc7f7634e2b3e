"""What a recipe needs to know of a task; each task's own room makes one of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.environments.base import TextEnvironment
from gearshift.runtime.config import Config


@dataclass(frozen=True, slots=True)
class Task:
    """A job for a policy: its data, its environment, and the figure that says how well it is done.

    The room that makes it must import without the task's optional packages, for every recipe
    reads every task's config.
    """

    name: str
    config: type[Config]
    """The class of the recipe's `task` section; its `name` is a `Literal` of this task's name."""
    prepare: Callable[[Any, int, Path], dict[str, Path]]
    """(config, seed, folder) -> the JSONL files that it wrote, `<split>.jsonl`, by split.
    `train`, `validation` and `test` hold a row for each episode, and share no problem; a task
    without them draws episodes by their seed alone. Settings are chosen by `validation`; `test`
    is looked at in the end.
    """
    make: Callable[[Any, Path], TextEnvironment]
    """(config, `<split>.jsonl`) -> an environment over that file's rows; `path.stem` tells the
    split."""
    system: str | None = None
    """The system message of every prompt, for who talks to the model."""
    metric: str = "success"
    """The figure that the held-out table compares: `success`, `reward`, or a name in the
    `info["metrics"]` of an episode's last step, where every episode has it. A key `metric` of the
    config comes before it."""
    corpus: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]] | None = None
    """Further figures of all held-out episodes together (BLEU, say), from their records: row,
    prompt, completion, reward, success, gold, metrics.
    """
    cluster: str = "cluster"
    """The column of a held-out row that names its problem: rows of one template, say, which a
    policy gets right or wrong together. Rows without it are problems of their own. Rows with equal
    prompts are always one problem."""
