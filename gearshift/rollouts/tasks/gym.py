"""Any registered text environment as a task: its episodes are drawn by seed, so there are no rows.

A room of its own so that a recipe can name an environment, the user's too, without code here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium
from pydantic import Field

from gearshift.errors import DataError
from gearshift.rollouts.environment import TextEnvironment
from gearshift.rollouts.gym_text import make_environment
from gearshift.rollouts.tasks.task import Task
from gearshift.runtime.config import Config
from gearshift.runtime.seeding import named_seed
from gearshift.types import Message

_TRIES = 200
"""Episodes of random play for each that is to be won."""


class GymConfig(Config):
    """A text environment that Gymnasium knows."""

    name: Literal["gym"] = "gym"
    """Which task this is."""
    id: str = "gearshift/GymInWords-v0"
    """The environment's id, or `my_module:MyEnvironment-v0`, whose module registers it."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """What it is made with."""
    system: str | None = None
    """A system message before each episode."""
    heldout: int = Field(64, ge=1)
    """Held-out episodes: seeds that training does not use."""
    labelled: int = Field(0, ge=0)
    """Episodes of random play (answers drawn from the environment's action space), for supervised
    fine-tuning: they teach what an answer looks like, not which one is good."""
    labelled_won: bool = False
    """Keep only those of them that the environment calls a success."""
    metric: str = "success"
    """The figure that policies are compared by: `success` where the environment tells it, else
    `reward`, or the name of one of its metrics."""


class WithSystem(gymnasium.Wrapper[str, str, str, str]):
    """The environment, with a system message before what the user says first."""

    def __init__(self, env: TextEnvironment, system: str) -> None:
        super().__init__(env)
        self.system = system

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        first: Message = {"role": "system", "content": self.system}
        said = info.get("messages") or [{"role": "user", "content": observation}]
        return observation, {**info, "messages": [first, *said]}


def make(config: GymConfig, path: Path) -> TextEnvironment:
    """The environment; which split `path` names makes no difference, for the seeds do."""
    environment = make_environment(config.id, **config.kwargs)
    if config.system is None:
        return environment
    return cast(TextEnvironment, WithSystem(environment, config.system))


def prepare(config: GymConfig, seed: int, folder: Path) -> dict[str, Path]:
    """Write `labelled.jsonl`, if any; the same for the same seed. Raises `ConfigError` if the
    environment cannot be made.
    """
    path = folder / "labelled.jsonl"
    environment = make(config, path)
    if not config.labelled:
        environment.close()
        return {}
    environment.action_space.seed(named_seed(seed, "gym/play") % 2**31)
    rows = []
    for i in range(_TRIES * config.labelled):
        messages, won = _play(environment, named_seed(seed, f"gym/labelled/{i}") % 2**31)
        if won or not config.labelled_won:
            rows.append({"messages": messages})
        if len(rows) == config.labelled:
            break
    else:
        raise DataError(
            f"Random play was won {len(rows)} times in {_TRIES * config.labelled} episodes of "
            f"{config.id}; lower labelled, or set labelled_won=false."
        )
    environment.close()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return {"labelled": path}


def _play(environment: TextEnvironment, seed: int) -> tuple[list[Message], bool]:
    """The conversation of one episode of random play, up to its last answer; whether it was won."""
    observation, info = environment.reset(seed=seed)
    messages: list[Message] = []
    while True:
        messages += info.get("messages") or [{"role": "user", "content": observation}]
        answer = environment.action_space.sample()
        messages.append({"role": "assistant", "content": answer})
        observation, _, ended, cut, info = environment.step(answer)
        if ended or cut:
            return messages, bool(info.get("success", False))


TASK = Task("gym", GymConfig, prepare, make)
