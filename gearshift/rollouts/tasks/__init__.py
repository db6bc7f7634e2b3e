"""The tasks that come with the system, by name."""

from __future__ import annotations

import difflib

from gearshift.errors import ConfigError
from gearshift.rollouts.tasks import (
    gym,
    reasoning,
    rows,
    sentiment,
    service,
    service_replies,
    tau2,
    translation,
    voice,
)
from gearshift.rollouts.tasks.task import Task

_ROOMS = (gym, reasoning, rows, sentiment, service, service_replies, tau2, translation, voice)
TASKS: dict[str, Task] = {room.TASK.name: room.TASK for room in _ROOMS}

TaskConfig = (
    gym.GymConfig
    | reasoning.ReasoningConfig
    | rows.RowsConfig
    | sentiment.SentimentConfig
    | service.ServiceConfig
    | service_replies.RepliesConfig
    | tau2.Tau2Config
    | translation.TranslationConfig
    | voice.VoiceConfig
)
"""The `task` section of a recipe; its `name` says which."""


def get_task(name: str) -> Task:
    """The task of this name. Raises `ConfigError` that suggests the nearest one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}."
        raise ConfigError(f"There is no task `{name}`; {hint}")
    return TASKS[name]
