"""Text environments with Gymnasium's API: a partner in a conversation, which answers, gives rewards
and ends the episode.

Users write environments, so this file knows only texts and rewards; it must not import models or
rollouts.
"""

from __future__ import annotations

import math
import string
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium
from gymnasium.vector.utils import create_shared_memory

from gearshift.errors import ConfigError
from gearshift.rewards.functions import RewardFunction, call_rewards
from gearshift.types import Message

MAX_CHARACTERS = 1 << 18


class AnyText(gymnasium.spaces.Text):
    """All strings of at most `MAX_CHARACTERS`, in any script; samples are printable ASCII."""

    def __init__(self) -> None:
        super().__init__(MAX_CHARACTERS, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __repr__(self) -> str:
        return "AnyText()"


@create_shared_memory.register(AnyText)
def _not_shared(space: AnyText, n: int = 1, ctx: Any = None) -> Any:
    """Gymnasium would read such shared memory once, while it is empty, and return zeros for
    ever.
    """
    raise gymnasium.error.CustomSpaceError("Texts have no fixed size; set shared_memory=False.")


class TextEnvironment(gymnasium.Env[str, str]):
    """A conversation: the observations are the user's messages, the actions the policy's answers.

    A collector reads these entries of `info` besides Gymnasium's return values:

    - `messages` of `reset`: the conversation so far, with a system message if there is one; the
      observation is its last message.
    - `template_options` of `reset`: arguments of the chat template, for example `tools`.
    - `row` of `reset`: the number of the environment's task; `options={"row": i}` chooses it.
    - `messages` of `step`: the messages that follow the answer, each with its role, if there are
      more than the observation (for example a tool's result); the observation is the last one.
    - `success` of the last `step`, where the environment knows it: whether the task was solved.
    - `gold`: a right answer as text, for the report.
    - `metrics`: {name: number} of the episode, averaged in the held-out table.
    """

    def __init__(self) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode -> (the user's first message, info).

        This method only seeds `np_random`: call it first. The same seed and options must start the
        same episode, because all episodes of a group have the same start.
        """
        super().reset(seed=seed)
        return "", {"messages": []}

    @abstractmethod
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer -> (the user's next message or "", reward, terminated, truncated, info).

        The reward may be None: then this turn has no reward.
        """

    def choose(self, options: dict[str, Any] | None, rows: int) -> int:
        """The row that `options` asks for, or a random one from `np_random`.

        Raises `ConfigError` if there is no such row.
        """
        row = (options or {}).get("row")
        if row is None:
            return int(self.np_random.integers(rows))
        if not 0 <= row < rows:
            raise ConfigError(f"The environment has no row {row}; its rows are 0 to {rows - 1}.")
        return int(row)


class RowEnvironment(TextEnvironment):
    """One question and one answer: each row has a prompt, and a reward function scores the
    answer.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], score: RewardFunction) -> None:
        """A row has `prompt` (messages, or the user's text) and the columns that `score` reads."""
        super().__init__()
        if not rows:
            raise ConfigError("A RowEnvironment got no rows; give it at least one.")
        self.rows, self.score = rows, score
        self._row: int | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._row = self.choose(options, len(self.rows))
        messages = self._prompt(self.rows[self._row])
        row = self.rows[self._row]
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        options = {**tools, **(row.get("chat_template_kwargs") or {})}
        info = {"messages": messages, "row": self._row, "template_options": options}
        return messages[-1]["content"], info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer; the episode ends. `info` has the row's columns, and the verdict if the
        reward is finite. The reward is None if the function does not apply, and NaN if it is
        missing.

        Raises `ResetNeeded` before a reset.
        """
        if self._row is None:
            raise gymnasium.error.ResetNeeded(
                "Call reset before step: an episode is one step long."
            )
        index, self._row = self._row, None
        row = self.rows[index]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        name = getattr(self.score, "__name__", "score")
        lists = {column: [value] for column, value in columns.items()}
        named = [(name, self.score, 1.0)]
        [[reward]] = call_rewards(named, [self._prompt(row)], [action], None, lists)
        has_reward = reward is not None and math.isfinite(reward)
        info = {**columns, "row": index}
        info |= self.verdict(row, action, cast(float, reward)) if has_reward else {}
        return "", cast(float, reward), True, False, info

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        """Further entries of `info` about an answer, for example `success`."""
        return {}

    def _prompt(self, row: Mapping[str, Any]) -> list[Message]:
        prompt = row["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
