"""The tasks that come with the system: where each one's data and environment are found, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.errors import ConfigError
from gearshift.rollouts.tasks import voice
from gearshift.runtime.config import Config


@dataclass(frozen=True, slots=True)
class Task:
    """What a recipe needs to know of a task."""

    name: str
    config: type[Config]
    """The class of the recipe's `task` section."""
    prepare: Callable[[Any, int, Path], dict[str, Path]]
    """(config, seed, folder) -> the data files that it wrote, by name."""
    environment: str
    """Gymnasium's id; it takes `path=`, one of the files."""
    system: str
    """The system message of every prompt."""


TASKS: dict[str, Task] = {
    "voice_assistant": Task(
        "voice_assistant",
        voice.VoiceConfig,
        voice.prepare,
        "gearshift/VoiceAssistant-v0",
        voice.SYSTEM,
    )
}


def get_task(name: str) -> Task:
    """The task of this name. Raises `ConfigError` that suggests the nearest one."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}."
        raise ConfigError(f"There is no task `{name}`; {hint}")
    return TASKS[name]
