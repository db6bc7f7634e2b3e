"""The tasks that come with the system, by name."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import Field

from gearshift.errors import ConfigError
from gearshift.rollouts.tasks import voice
from gearshift.rollouts.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (voice.TASK,)}

TaskConfig = Annotated[voice.VoiceConfig, Field()]
"""The `task` section of a recipe; its `name` says which."""


def get_task(name: str) -> Task:
    """The task of this name. Raises `ConfigError` that suggests the nearest one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}."
        raise ConfigError(f"There is no task `{name}`; {hint}")
    return TASKS[name]
