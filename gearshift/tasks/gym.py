"""Any registered text environment as a task. Its rows are seeds, or its episodes are drawn by seed.
A recipe names the environment by its id; it may be the user's own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium
from pydantic import Field

from gearshift.data.overlap import prompt_text
from gearshift.environments.base import TextEnvironment
from gearshift.environments.registry import make_environment
from gearshift.errors import ConfigError, DataError
from gearshift.runtime.seeding import named_seed
from gearshift.runtime.terminal import counted, echo
from gearshift.tasks.rows import read_rows, write_rows
from gearshift.tasks.task import Task, TaskConfig
from gearshift.types import Message

_TRIES = 200
"""How many episodes of random play are tried for each one that must be won."""


class GymConfig(TaskConfig):
    """A text environment that Gymnasium knows."""

    name: Literal["gym"] = "gym"
    """The name of the task."""
    id: str = "gearshift/GymInWords-v0"
    """The environment's id, or `my_module:MyEnvironment-v0`, where the module registers it."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """The arguments with which the environment is made."""
    system: str | None = None
    """The system message at the beginning of each episode; null adds none."""
    validation: int = Field(default=64, ge=1)
    """How many episodes validation has, at most."""
    test: int = Field(default=64, ge=1)
    """How many episodes the test has, at most."""
    starts: int | None = Field(default=None, ge=0)
    """How many seeds are tried to list the different starts of an episode, so that training,
    validation and test share no start. 0 gives each split its own seeds, and episodes of two splits
    may start alike. null is 1000 for `gearshift/GymInWords-v0`, and 0 for other environments."""
    heldout_fraction: float = Field(default=0.3, gt=0, lt=1)
    """The share of the different starts that training does not use; half of them are for
    validation, the other half for the test."""
    labelled: int = Field(default=0, ge=0)
    """How many episodes of random play there are for supervised fine-tuning. Their answers are
    drawn from the environment's action space: they teach the form of an answer, but not which
    answer is good."""
    labelled_won: bool = False
    """Whether only those episodes of random play are kept that the environment reports as a
    success."""
    metric: str = "success"
    """The figure by which policies are compared: `success` if the environment reports it, `reward`,
    or the name of one of its metrics."""


class WithSystem(gymnasium.Wrapper[str, str, str, str]):
    """The environment, with a system message before the user's first message."""

    def __init__(self, env: TextEnvironment, system: str) -> None:
        super().__init__(env)
        self.system = system

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        first: Message = {"role": "system", "content": self.system}
        opening = info.get("messages") or [{"role": "user", "content": observation}]
        return observation, {**info, "messages": [first, *opening]}


class OfRows(gymnasium.Wrapper[str, str, str, str]):
    """The environment; each episode starts with the seed of one of these rows."""

    def __init__(self, env: TextEnvironment, rows: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(env)
        self.rows = rows

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        row = (options or {}).get("row", (seed or 0) % len(self.rows))
        return self.env.reset(seed=self.rows[row]["seed"])


def make(config: GymConfig, path: Path) -> TextEnvironment:
    """The environment with the rows of `path`. Without a file, splits differ by their seeds."""
    if config.id not in gymnasium.registry:
        import gearshift.tasks.registry  # noqa: F401  (a task may register it)
    environment = make_environment(config.id, **config.kwargs)
    if config.system is not None:
        environment = cast(TextEnvironment, WithSystem(environment, config.system))
    if path.stem in ("train", "validation", "test") and path.exists():
        return cast(TextEnvironment, OfRows(environment, read_rows(path, "seed")))
    return environment


def prepare(config: GymConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write the task's files into `folder`, the same for the same seed; returns them by name.

    train.jsonl        prompt, cluster, seed; where episodes are identified by their starts
    validation.jsonl   the same; and test.jsonl: no start is in two files
    labelled.jsonl     messages: random play from starts of training; if the config asks for it

    Raises `ConfigError` if the environment cannot be made or has fewer than three starts.
    """
    environment = make(config, folder / "labelled.jsonl")
    files: dict[str, list[dict[str, Any]]] = dict(_split_starts(config, environment, seed))
    if config.labelled:
        known = {row["cluster"] for row in files.get("train", ())}
        files["labelled"] = _labelled(config, environment, seed, known)
    environment.close()
    return write_rows(folder, files) if files else {}


def start_of(messages: Sequence[Message], row: Any) -> str:
    """The name of a start: the row that the environment names, else its messages."""
    return prompt_text(messages) if row is None else f"row {row}"


def _split_starts(
    config: GymConfig, environment: TextEnvironment, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split; there are none if episodes are drawn by their seeds."""
    draws = config.starts
    if draws is None:
        draws = 1000 if config.id == GymConfig().id else 0
    by_start: dict[str, list[dict[str, Any]]] = {}
    for i in range(draws):
        start = named_seed(seed, f"gym/start/{i}") % 2**31
        observation, info = environment.reset(seed=start)
        opening = info.get("messages") or [{"role": "user", "content": observation}]
        key = start_of(opening, info.get("row"))
        # If the environment names its row, equal messages may begin different problems.
        prompt = opening if info.get("row") is None else []
        by_start.setdefault(key, []).append({"prompt": prompt, "cluster": key, "seed": start})
    if draws and len(by_start) < 3:
        few = f"{config.id} starts in {counted(len(by_start), 'way')} only"
        if config.starts:
            raise ConfigError(f"{few}, too few to hold some out; set task.starts=0.")
        echo(f"data: {few}: held-out episodes start as those of training do")
    if len(by_start) < 3:
        return {}
    order = sorted(by_start)
    random.Random(named_seed(seed, "gym/starts")).shuffle(order)
    cut = min(len(order) - 1, max(2, round(config.heldout_fraction * len(order))))
    splits = {
        "validation": order[: cut // 2],
        "test": order[cut // 2 : cut],
        "train": order[cut:],
    }
    files = {}
    for split, starts in splits.items():
        # Each start once, then each again, so that any first part holds all starts equally.
        turns = zip_longest(*(by_start[start] for start in starts))
        rows = [row for turn in turns for row in turn if row is not None]
        files[split] = rows if split == "train" else rows[: getattr(config, split)]
    return files


def _labelled(
    config: GymConfig, environment: TextEnvironment, seed: int, known: set[str]
) -> list[dict[str, Any]]:
    """Conversations of random play, from the starts that are `known` (if any are)."""
    environment.action_space.seed(named_seed(seed, "gym/play") % 2**31)
    rows: list[dict[str, Any]] = []
    for i in range(_TRIES * config.labelled):
        messages, won = _play(environment, named_seed(seed, f"gym/labelled/{i}") % 2**31, known)
        if messages and (won or not config.labelled_won):
            rows.append({"messages": messages})
        if len(rows) == config.labelled:
            break
    else:
        raise DataError(
            f"Random play was won {counted(len(rows), 'time')} in {_TRIES * config.labelled} "
            f"episodes of {config.id}; lower labelled, or set labelled_won=false."
        )
    return rows


def _play(environment: TextEnvironment, seed: int, known: set[str]) -> tuple[list[Message], bool]:
    """The conversation of one episode of random play, up to its last answer; whether it was won.
    There are no messages if `known` has starts and this one is not among them.
    """
    observation, info = environment.reset(seed=seed)
    messages: list[Message] = []
    opening = info.get("messages") or [{"role": "user", "content": observation}]
    if known and start_of(opening, info.get("row")) not in known:
        return [], False
    while True:
        messages += info.get("messages") or [{"role": "user", "content": observation}]
        answer = environment.action_space.sample()
        messages.append({"role": "assistant", "content": answer})
        observation, _, ended, cut, info = environment.step(answer)
        if ended or cut:
            return messages, bool(info.get("success", False))


def check(config: GymConfig) -> None:
    """Raises `GearshiftError` if the environment cannot be made."""
    make(config, Path("labelled.jsonl")).close()


TASK = Task("gym", GymConfig, prepare, make, check=check)
