"""The tasks that are installed: what the entry-point group `gearshift.tasks` names, of this package
and of any other. Importing this file loads them, and so registers their environments with
Gymnasium. It must not import a task by its module.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import TYPE_CHECKING, Any

from gearshift.errors import ConfigError
from gearshift.runtime.terminal import echo
from gearshift.runtime.user_functions import describe_error
from gearshift.tasks.task import Task, TaskConfig

GROUP = "gearshift.tasks"
_OWN = "gearshift"


def load_tasks(points: Iterable[EntryPoint]) -> tuple[dict[str, Task], dict[str, str]]:
    """(tasks by name, reasons by name why other tasks cannot be used). A task that cannot be loaded
    does not affect the others. This package's own tasks keep their names; if several other packages
    use one name, none of them gets it.
    """
    found: dict[str, list[EntryPoint]] = {}
    for point in points:
        found.setdefault(point.name, []).append(point)
    tasks: dict[str, Task] = {}
    problems: dict[str, str] = {}
    for name, same in sorted(found.items()):
        own = [point for point in same if _package(point) == _OWN]
        if len(same) > 1:
            packages = ", ".join(sorted(_package(point) for point in same))
            problems[name] = (
                f"The task name `{name}` is taken by several packages ({packages}); uninstall all "
                "of them but one, or have one choose another name."
            )
        if len(same) > 1 and not own:
            continue
        point = (own or same)[0]
        try:
            tasks[name] = _load(point)
        except (Exception, SystemExit) as error:
            problems[name] = (
                f"The task `{name}` of the package {_package(point)} cannot be loaded: "
                f"{describe_error(error)}; fix that package, or uninstall it."
            )
    return tasks, problems


def _load(point: EntryPoint) -> Task:
    task = point.load()
    if not isinstance(task, Task):
        raise TypeError(f"{point.value} is a {type(task).__name__}, not a gearshift Task")
    name = _name_of(task)
    if not task.name == name == point.name:
        raise ValueError(
            f"the entry point is called `{point.name}`, its Task `{task.name}` and the default of "
            f"its config's `name` {name!r}, which should all be equal"
        )
    return task


def _name_of(task: Task) -> Any:
    """The default name in the task's config."""
    fields = task.config.model_fields if issubclass(task.config, TaskConfig) else {}
    return fields["name"].default if "name" in fields else None


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "(unknown)"


TASKS, PROBLEMS = load_tasks(entry_points(group=GROUP))
if not TASKS:
    why = next(iter(PROBLEMS.values()), "this installation has no entry points of that name.")
    raise ConfigError(
        f"No task of the entry-point group {GROUP} can be used: {why} Install gearshift again: "
        "`make setup`, or `pip install -e .` in its folder."
    )

if TYPE_CHECKING:
    AnyTaskConfig = TaskConfig
else:
    AnyTaskConfig = reduce(or_, (task.config for task in TASKS.values()))
    """The type of a recipe's `task` section: one of the tasks' configs, selected by `name`."""


def register(task: Task) -> None:
    """Register a task that no package installs, for this process; it replaces an earlier one of the
    same name. Raises `ConfigError` for a name that an installed task has.
    """
    if task.name in TASKS and task.name not in _registered:
        raise ConfigError(f"The name `{task.name}` is an installed task's; choose another name.")
    if (name := _name_of(task)) != task.name:
        raise ConfigError(
            f"The task `{task.name}` has a config whose `name` is {name!r} by default; both should "
            "be equal."
        )
    TASKS[task.name] = task
    _registered.add(task.name)


_registered: set[str] = set()


def get_task(name: str) -> Task:
    """The task of this name. Raises `ConfigError` that suggests the nearest one."""
    if name in TASKS:
        return TASKS[name]
    if name in PROBLEMS:
        raise ConfigError(PROBLEMS[name])
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TASKS)}."
    raise ConfigError(f"There is no task `{name}`; {hint}")


def check_task(section: Any) -> None:
    """Raises `ValueError` for the `task` section of a recipe that names a task which is installed
    but cannot be used.
    """
    name = section.get("name") if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in PROBLEMS:
        return
    if name not in TASKS:
        raise ValueError(PROBLEMS[name])
    _warn(f"gearshift: {PROBLEMS[name]} This run takes gearshift's own.")


@cache
def _warn(line: str) -> None:
    echo(line, file=sys.stderr)
