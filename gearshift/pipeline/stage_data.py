"""The rows of a stage: each source loaded, cleaned and rendered, and all of them mixed. It must not
import a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from gearshift.data import DataConfig, Mixture, clean, load_rows
from gearshift.data.labels import Format
from gearshift.errors import ConfigError, OverlongError
from gearshift.pipeline.context import Context
from gearshift.runtime.terminal import counted

Example = TypeVar("Example")
Row = dict[str, Any]


def load_sources(config: DataConfig, run: Context, labels: Format) -> list[list[Row]]:
    """The cleaned rows of each source; `task:NAME` is a file that the task prepared. Labels of
    people give rows in the format `labels`.
    """
    sources = []
    for source in config.sources:
        path = source.path
        if path.startswith("task:"):
            path = str(run.task.path(path.removeprefix("task:")))
        rows, report = clean(
            load_rows(path, source.split, labels)[: source.limit], config.clean, answered=True
        )
        run.echo(f"data: {source.path}: {report}")
        sources.append(rows)
    return sources


def render_sources(
    config: DataConfig,
    run: Context,
    render: Callable[[list[Row]], list[Example]],
    labels: Format = "messages",
) -> list[list[Example]]:
    """What the rows of each source become, without those that are too long where the recipe leaves
    them out. Labels of people give rows in the format `labels`.
    """
    sources = load_sources(config, run, labels)
    if config.overlong == "drop":
        for i, rows in enumerate(sources):
            sources[i] = [row for row in rows if _fits(row, render)]
            if left := len(rows) - len(sources[i]):
                path = config.sources[i].path
                run.echo(f"data: {path}: {left} of {counted(len(rows), 'row')} left out, too long")
    return [render(rows) for rows in sources]


def render_rows(
    config: DataConfig,
    run: Context,
    render: Callable[[list[Row]], list[Example]],
    labels: Format = "messages",
) -> list[Example]:
    """The same of all sources, one after another."""
    return [row for rows in render_sources(config, run, render, labels) for row in rows]


def mix(config: DataConfig, run: Context, sources: list[list[Example]]) -> Mixture[Example]:
    """The rendered sources as one order of rows. Raises `ConfigError` if there is none."""
    if not sources:
        raise ConfigError("This stage has no data; name some under data.sources.")
    return Mixture(sources, [source.weight for source in config.sources], run.seed)


def _fits(row: Row, render: Callable[[list[Row]], list[Any]]) -> bool:
    try:
        render([row])
    except OverlongError:
        return False
    return True
