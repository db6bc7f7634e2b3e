"""A recipe's task with the files that it prepared: the rows of each split, and episodes over them.
It must not import what trains.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gearshift.data import load_rows
from gearshift.data.overlap import prompt_text
from gearshift.engine import Engine
from gearshift.environments.base import TextEnvironment
from gearshift.environments.worker_processes import EnvironmentProcesses
from gearshift.errors import ConfigError, DataError
from gearshift.models.made import DONE
from gearshift.pipeline.provenance import Trained, prepared, prompt_of
from gearshift.pipeline.recipe import Recipe
from gearshift.rollouts.backend import GenerationBackend
from gearshift.rollouts.collector import EPISODE_TIMEOUT, WORKERS, Collector
from gearshift.rollouts.evaluate import Split
from gearshift.rollouts.intervals import merged
from gearshift.runtime.digests import file_digests, write_sealed
from gearshift.runtime.files import writing
from gearshift.runtime.terminal import counted, echo
from gearshift.runtime.user_functions import describe_error
from gearshift.tasks.registry import get_task
from gearshift.tasks.task import Task, TaskConfig
from gearshift.trainers.push import PolicyOnServers

EPISODES = 64
"""Held-out episodes where neither the task nor `eval.limit` gives their number."""


@dataclass(frozen=True, slots=True)
class TaskData:
    """A recipe's task with the files that it prepared in a folder."""

    recipe: Recipe
    folder: Path

    @property
    def config(self) -> TaskConfig:
        """The recipe's `task` section. Raises `ConfigError` if it has none."""
        if self.recipe.task is None:
            raise ConfigError("The recipe has no task to evaluate on; set task.name.")
        return self.recipe.task

    @property
    def task(self) -> Task:
        """What the core asks of the task."""
        return get_task(self.config.name)

    def prepare(self) -> None:
        """Write the files, once. `done.json` records that they are whole."""
        config, task = self.config, self.task
        if (self.folder / DONE).exists():
            for split in (path.stem for path in self.folder.glob("*.jsonl")):
                self.path(split)  # raises for a file that changed, even if it is not used again
            return
        began = time.perf_counter()
        echo(f"data: preparing {config.name}")
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        try:
            files = task.prepare(config, self.recipe.run.seed, self.folder)
        except SystemExit as error:  # an environment's, which would end the run without a word
            raise ConfigError(
                f"The task {config.name} cannot be prepared: {describe_error(error)}."
            ) from None
        seconds = time.perf_counter() - began
        named = {k: str(v) for k, v in files.items()}
        digests = file_digests(
            self.folder, [p.name for p in files.values() if p.parent == self.folder]
        )
        done = {"files": named, "digests": digests, "seconds": seconds}
        write_sealed(self.folder / DONE, done)

    def path(self, split: str) -> Path:
        """The file of a split, whether or not the task writes one. Raises `StorageError` if it is
        not as it was prepared.
        """
        return prepared(self.folder, split)

    def load(self, split: str) -> Sequence[Mapping[str, Any]] | None:
        """The split's rows; None where the task draws episodes by their seed."""
        path = self.path(split)
        if path.exists():
            return load_rows(str(path))
        if split != "train" and self.path("train").exists():
            raise DataError(
                f"There is no file {path}: the data was prepared before there were three splits; "
                "evaluate the run with --recipe, or run it in another folder."
            )
        return None

    def rows(self, split: str) -> int | None:
        """How many rows the split has; None where the task draws episodes by their seed."""
        rows = self.load(split)
        return None if rows is None else len(rows)

    def unseen(self, split: Split, trained: Trained | None) -> list[int] | None:
        """The split's rows that no stage trained on; None where the task has no rows. Raises
        `DataError` if none is left.
        """
        rows = self.load(split)
        if rows is None or trained is None:
            return None if rows is None else list(range(len(rows)))
        left = trained.unseen(rows, self.task.cluster)
        if not left:
            raise DataError(
                f"{trained.run} trains on all {counted(len(rows), f'{split} row')}, so they cannot "
                "show how good it is; take the stages' data from task:labelled, or name other rows."
            )
        return left

    def backend(self, engine: Engine) -> GenerationBackend:
        """What samples the policy of this engine: the engine itself, or vLLM servers."""
        if self.recipe.generation.backend == "engine":
            return engine.loop
        return PolicyOnServers(self.recipe.generation, engine, self.folder.parent)

    def collector(self, engine: Engine, split: str) -> Collector:
        """Episodes over the split's rows."""
        rl, processes = self.recipe.rl, self.recipe.environment.processes
        make: Callable[[], TextEnvironment] = partial(self.task.make, self.config, self.path(split))
        return Collector(
            EnvironmentProcesses(make) if processes else make,
            engine.tokenizer,
            self.backend(engine),
            workers=processes or WORKERS,
            timeout=rl.rollout.timeout if rl else EPISODE_TIMEOUT,
        )


def problems_of(rows: Sequence[Mapping[str, Any]], column: str) -> dict[int, int]:
    """The problem of each row: one for rows that name the same in `column`, or whose prompts are
    equal.
    """
    named = [i if row.get(column) is None else str(row[column]) for i, row in enumerate(rows)]
    texts = [prompt_text(prompt_of(row)) or i for i, row in enumerate(rows)]
    return dict(enumerate(merged(named, texts)))
