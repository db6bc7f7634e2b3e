"""The faults of a recipe that can be found without training: files, functions and first rows.
`--dry-run` and the start of a run look for them. This file must not import what runs a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gearshift.data import to_preference, to_stepwise, to_supervised, to_unpaired
from gearshift.data.check import check_source
from gearshift.errors import ConfigError
from gearshift.pipeline.recipe import Recipe, StageName
from gearshift.rewards.build import load_reward
from gearshift.rewards.composite import ENVIRONMENT
from gearshift.runtime.user_functions import GIVEN
from gearshift.tasks.registry import TASKS, get_task

_READ: dict[StageName, Callable[[Any], Any]] = {
    "sft": to_supervised,
    "preference": to_unpaired,
    "reward": to_preference,
    "process": to_stepwise,
    "rl": to_supervised,
}
"""How each stage reads a row."""
_UNCHECKED = (ENVIRONMENT, "judge:", "http://", "https://", GIVEN)
"""How the names of rewards begin that are no function of a file or a module. An address may name a
secret that only the machine of the run has."""


def check_recipe(recipe: Recipe, stages: Iterable[StageName]) -> None:
    """Raises `GearshiftError` for the first thing that these stages, or the task, name and that is
    not there or cannot be read.
    """
    if recipe.task and (check := get_task(recipe.task.name).check):
        check(recipe.task)
    for name in stages:
        if getattr(recipe, name) is not None:
            _check_stage(recipe, name)


def _check_stage(recipe: Recipe, name: StageName) -> None:
    inputs = getattr(recipe, name).inputs()
    if inputs.task and recipe.task is None:
        raise ConfigError(f"{name} needs a task; set task.name, one of {', '.join(TASKS)}.")
    for data in inputs.learned:
        if not data.sources:
            raise ConfigError(f"{name} has no data; name some under {name}.data.sources.")
    for data in (*inputs.learned, *inputs.heldout):
        for source in data.sources:
            if not source.path.startswith("task:"):
                check_source(source, data.clean, _READ[name], True, inputs.labels)
            elif recipe.task is None:
                raise ConfigError(f"{name}: {source.path} is a task's file; set task.name.")
    for function in inputs.functions:
        if not function.startswith(_UNCHECKED):
            load_reward(function)
