"""A small game of many turns: the policy guesses a number, and the user answers higher or lower.

It is an example of an environment, and tests use it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import gymnasium

from gearshift.environments.base import TextEnvironment
from gearshift.errors import ConfigError


class GuessNumber(TextEnvironment):
    """Find a number from 1 to `top`: after each wrong guess the user says "Higher." or "Lower.".

    Let n be how many numbers all answers so far allow. The reward of a turn is 0.5 * log(n before /
    n after) / log(top), which is half of the share of the uncertainty that the guess removed, plus
    0.5 for the number itself. So an episode that finds the number returns 1 in total, however many
    turns it took, and a guess without information earns nothing. Row i is the number 1 + i.
    """

    def __init__(self, top: int = 20, turns: int = 5) -> None:
        """Raises `ConfigError` unless there are at least two numbers and one turn."""
        super().__init__()
        if top < 2 or turns < 1:
            raise ConfigError(
                f"top={top}, turns={turns} is not a game; top must be at least 2, and turns at "
                "least 1."
            )
        self.top, self.turns = top, turns
        self._number = self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        row = self.choose(options, self.top)
        self._number, self._left, self._low, self._high = 1 + row, self.turns, 1, self.top
        text = f"I think of a number from 1 to {self.top}. Guess it; answer with one number only."
        return text, {"messages": [{"role": "user", "content": text}], "row": row}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Raises `ResetNeeded` when the episode is over or has not begun."""
        if not self._left:
            raise gymnasium.error.ResetNeeded("Call reset before step: no episode is running.")
        self._left -= 1
        guess = int(action) if re.fullmatch(r"\s*[0-9]{1,9}\s*", action) else None
        before = self._high - self._low + 1
        answer = "One number only."
        if guess is not None:
            answer = "Higher." if guess < self._number else "Lower."
            if guess <= self._number:
                self._low = max(self._low, guess + (guess < self._number))
            if guess >= self._number:
                self._high = min(self._high, guess - (guess > self._number))
        found = guess == self._number
        learned = math.log(before / (self._high - self._low + 1)) / math.log(self.top)
        info = {"success": found, "gold": str(self._number)}
        if found:
            self._left = 0
        over = not found and not self._left
        return "" if found or over else answer, 0.5 * learned + 0.5 * found, found, over, info
