"""The interface of a task: its data, its environment, and how to talk to its model. A task is
a `Task` object that the entry-point group `gearshift.tasks` names. This file must not import a
task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.environments.base import TextEnvironment
from gearshift.runtime.config import Config
from gearshift.types import Message


class TaskConfig(Config):
    """Base of every task's config, which is the `task` section of a recipe."""

    name: str
    """Which task this is: a `Literal` of the task's name, which is its default too."""


@dataclass(frozen=True, slots=True)
class TaskPanel:
    """What the chat page shows beside a conversation with a model of this task."""

    folder: Path
    """A folder with `panel.js`, an ES module that exports the preact component `Panel`. The browser
    loads it and the other .js, .css and .svg files of the folder from `/web/task/`."""
    state: Callable[[Any, Path, Sequence[Message]], Mapping[str, Any]]
    """(config, run's folder, conversation) -> the JSON that `Panel` draws. It is computed anew from
    the whole conversation, so that each branch of it has its own state. The messages are untrusted.
    It raises `GearshiftError` for what it cannot show."""
    single: bool = False
    """Whether the model gets each message alone, as in its training, without the earlier ones."""


@dataclass(frozen=True, slots=True)
class Task:
    """A job for a policy: its data, its environment, and the figure that measures success. Its
    module must import without the task's optional packages, because every recipe reads every task's
    config.
    """

    name: str
    """The name in the recipe's `task.name`, and of the entry point."""
    config: type[TaskConfig]
    """The class of the recipe's `task` section; its `name` is a `Literal` of this task's name."""
    prepare: Callable[[Any, int, Path], dict[str, Path]]
    """(config, seed, folder) -> the JSONL files that it wrote, `<split>.jsonl`, by split.
    `train`, `validation` and `test` hold a row for each episode, and share no problem; a task
    without them draws episodes by their seed alone. Settings are chosen by `validation`; `test`
    is evaluated once, at the end.
    """
    make: Callable[[Any, Path], TextEnvironment]
    """(config, `<split>.jsonl`) -> an environment over that file's rows; `path.stem` is the name of
    the split."""
    system: str | None = None
    """The system message of every prompt; a chat with the model starts with it too."""
    metric: str = "success"
    """The figure that the held-out table compares: `success`, `reward`, or a name in the
    `info["metrics"]` of an episode's last step, where every episode has it. A key `metric` of the
    config comes before it."""
    corpus: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]] | None = None
    """Further figures of all held-out episodes together (BLEU, for example), from their records:
    row, prompt, completion, reward, success, gold, metrics.
    """
    cluster: str = "cluster"
    """The column of a held-out row that names its problem: rows of one template, for example, which
    a policy gets right or wrong together. Rows without it are problems of their own. Rows with
    equal prompts are always one problem."""
    spoken_answer: Callable[[str, str], str] | None = None
    """(answer, language) -> the sentence to speak in its place; None speaks the answer itself."""
    phrases: Callable[[Path], Sequence[str]] | None = None
    """(run's folder) -> sentences that a speech recogniser expects in front of a run's model, in
    small letters, words alone; None expects any sentence."""
    check: Callable[[Any], object] | None = None
    """(config) -> raises `GearshiftError` for what the config names and is not there, such as a
    file. `--dry-run` calls it, so it must be quick and write nothing."""
    panel: TaskPanel | None = None
    """What the chat page of `gearshift serve` shows beside a conversation; None shows nothing."""
