"""Text environments on Gymnasium's own API: a chat partner that answers, rewards and says the end.

A room of its own because environments are what users write: it knows texts and rewards, and neither
a model nor a tokenizer nor who plays.
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
    """All strings of at most `MAX_CHARACTERS`, in any script; it samples printable ASCII."""

    def __init__(self) -> None:
        super().__init__(MAX_CHARACTERS, min_length=0, charset=string.printable)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __repr__(self) -> str:
        return "AnyText()"


@create_shared_memory.register(AnyText)
def _not_shared(space: AnyText, n: int = 1, ctx: Any = None) -> Any:
    """Gymnasium would read such memory once, when it is empty, and show zeros for ever."""
    raise gymnasium.error.CustomSpaceError("Texts have no fixed size; set shared_memory=False.")


class TextEnvironment(gymnasium.Env[str, str]):
    """A conversation: observations are what the user says, actions what the policy answers.

    What a collector reads besides Gymnasium's return values:
    `info["messages"]` of `reset`: the chat so far, a system message too; the observation is last.
    `info["template_options"]` of `reset`: what the chat template gets besides, `tools` say.
    `info["row"]` of `reset`: which of the environment's tasks it is; `options={"row": i}` picks.
    `info["messages"]` of `step`, where more than the observation is said (a tool's result, say):
    the messages that follow the answer, each with its role; the observation is last.
    `info["success"]` of the last `step`, where the environment can tell: the task was solved.
    `info["gold"]`: a right answer as text, for the report.
    `info["metrics"]`: {name: number} of the episode, averaged in the held-out table.
    """

    def __init__(self) -> None:
        self.observation_space = AnyText()
        self.action_space = AnyText()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode -> (the user's first message, info).

        This one only seeds `np_random`: call it first. The same seed and options must start the
        same episode, for a group is many episodes of one start.
        """
        super().reset(seed=seed)
        return "", {"messages": []}

    @abstractmethod
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer -> (the user's next message or "", reward, terminated, truncated, info).

        A reward may be None: none is given at this turn.
        """

    def choose(self, options: dict[str, Any] | None, rows: int) -> int:
        """The row that `options` asks for, or one drawn from `np_random`.

        Raises `ConfigError` if there is no such row.
        """
        row = (options or {}).get("row")
        if row is None:
            return int(self.np_random.integers(rows))
        if not 0 <= row < rows:
            raise ConfigError(f"The environment has no row {row}; its rows are 0 to {rows - 1}.")
        return int(row)


class RowEnvironment(TextEnvironment):
    """One question, one answer: each row is a prompt, and a reward function scores the answer."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], score: RewardFunction) -> None:
        """A row holds `prompt` (messages, or the user's text) and the columns for `score`."""
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
        told = {"messages": messages, "row": self._row, "template_options": options}
        return messages[-1]["content"], told

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Score the answer; the episode ends. `info` holds the row's columns and the verdict, where
        there is a finite reward: it is None where the score does not apply, NaN where it is lost.

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
        told = reward is not None and math.isfinite(reward)
        info = {**columns, "row": index}
        info |= self.verdict(row, action, cast(float, reward)) if told else {}
        return "", cast(float, reward), True, False, info

    def verdict(self, row: Mapping[str, Any], action: str, reward: float) -> dict[str, Any]:
        """What else to say of an answer in `info`, `success` for example."""
        return {}

    def _prompt(self, row: Mapping[str, Any]) -> list[Message]:
        prompt = row["prompt"]
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
