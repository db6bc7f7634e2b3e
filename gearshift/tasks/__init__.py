"""The tasks that come with the system, by name."""

from __future__ import annotations

import difflib

from gearshift.errors import ConfigError
from gearshift.tasks import gym, rows
from gearshift.tasks.reasoning import task as reasoning
from gearshift.tasks.sentiment import task as sentiment
from gearshift.tasks.service import replies as service_replies
from gearshift.tasks.service import task as service
from gearshift.tasks.task import Task
from gearshift.tasks.tau2 import task as tau2
from gearshift.tasks.translation import task as translation
from gearshift.tasks.voice import task as voice

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
