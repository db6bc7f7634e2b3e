"""Environments that a model of a few thousand weights can learn, and ones that misbehave."""

import math
import threading
from typing import Any

import numpy as np

from gearshift.environments.base import TextEnvironment
from gearshift.types import Message


class SayLetters(TextEnvironment):
    """One turn: the reward is the fraction of the answer's characters that are ASCII letters."""

    def _start(self, options: dict[str, Any] | None) -> str:
        word = str(self.np_random.integers(0, 9))
        self.messages: list[Message] = [{"role": "user", "content": f"say letters {word}"}]
        return self.messages[0]["content"]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return self._start(options), {"messages": self.messages, "row": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        reward = sum(c.isascii() and c.isalpha() for c in action) / max(len(action), 1)
        return "", reward, True, False, {"success": reward > 0.5}


class TwoTurns(SayLetters):
    """Two turns, each rewarded: first with 0.25, then with 1."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.turn = 0
        return super().reset(seed=seed, options=options)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        if self.turn == 1:
            return "and again", 0.25, False, False, {}
        return "", 1.0, True, False, {"success": True}


class Faulty(SayLetters):
    """Every other one that is made raises, or gives NaN."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Faulty.made += 1
        self.fault = {0: "raise", 1: "nan"}.get(Faulty.made % 4)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.fault == "raise":
            raise RuntimeError("the simulator fell over")
        observation, reward, *rest = super().step(action)
        return observation, float("nan") if self.fault == "nan" else reward, *rest


class Bandit(TextEnvironment):
    """One token, whose reward is known: an arm for each byte, the best ones worth 1."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        messages: list[Message] = [{"role": "user", "content": "pull"}]
        return "pull", {"messages": messages, "row": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", arm(action), True, False, {}


def arm(text: str) -> float:
    """0, 1/4, 1/2, 3/4 or 1; nothing for no text."""
    return ((ord(text[0]) + 2) % 5) / 4 if text else 0.0


class Misbehaves(SayLetters):
    """Has the fault that its row names, in `reset` or in `step`; row 0 has none."""

    def __init__(self, *faults: str) -> None:
        super().__init__()
        self.faults = ("", *faults)
        self.never = threading.Event()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        said = super().reset(seed=seed)
        self.fault = self.faults[(options or {}).get("row", 0)]
        return self.fails(self.fault.removeprefix("reset "), said)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self.fails(self.fault, super().step(action))

    def fails(self, fault: str, answer: Any) -> Any:
        observation, *rest = answer
        if fault == "hang":
            self.never.wait()
        if fault == "spin":
            while True:
                pass
        if fault == "raise":
            raise RuntimeError("the simulator fell over")
        if fault == "exit":
            raise SystemExit(1)
        if fault == "short":
            return (observation,)
        if fault == "number":
            info = {"messages": [{"role": "user", "content": 7}]}
            return (7, info) if len(rest) == 1 else (7, 0.0, False, False, {})
        if fault in ("nan", "inf", "none", "text") and len(rest) > 1:
            values = {"nan": math.nan, "inf": math.inf, "none": None, "text": "1"}
            return observation, values[fault], *rest[1:]
        if fault == "verdict" and len(rest) > 1:
            return observation, *rest[:-1], {"success": np.zeros(2)}
        return answer
