"""Episodes that reinforcement learning had to leave out: how many, why, and when that is too many.

One that failed costs itself and never the run; a run that learns from nothing at all ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gearshift.errors import DataError

Reason = Literal["environment", "overlong_prompt", "no_reward", "alone", "no_greedy"]
_WORDS: dict[Reason, str] = {
    "environment": "lost to the environment",
    "overlong_prompt": "whose prompt leaves no place for an answer",
    "no_reward": "without a reward",
    "alone": "alone in their group",
    "no_greedy": "whose greedy episode was lost",
}
_PATIENCE = 16
"""Prompts in a row that may come to nothing."""


@dataclass
class LeftOut:
    """Counts over the whole run: they are in its checkpoints."""

    counts: dict[str, int] = field(default_factory=dict)
    """Episodes by `Reason`."""
    why: str = ""
    """What the last of them was lost to."""
    barren: int = 0
    """Prompts since the last one that there was something to learn from."""
    learned: bool = False
    """Whether there was such a prompt in this run."""

    def add(self, reason: Reason, episodes: int, why: str = "") -> None:
        """Count these episodes."""
        if episodes:
            self.counts[reason] = self.counts.get(reason, 0) + episodes
            self.why = why or self.why

    def prompts(self, tried: int, tokens: int) -> None:
        """So many prompts were tried, and this much was learned from. Raises `DataError` where many
        in a row came to nothing.
        """
        self.barren = 0 if tokens else self.barren + tried
        self.learned = self.learned or tokens > 0
        if self.barren >= _PATIENCE:
            self.end()

    def end(self) -> None:
        """Raise `DataError` if nothing is learned from any more."""
        if self.barren >= _PATIENCE or not self.learned:
            raise DataError(
                f"No episode of the last {self.barren} prompts has a reward to learn from "
                f"({self.why or 'every reward was None'}); look at the environment and the rewards."
            )

    def metrics(self) -> dict[str, float]:
        """So far, by reason."""
        names = {r: f"left_out/{r}" for r in _WORDS} | {"environment": "environment/failures"}
        return {name: float(self.counts.get(r, 0)) for r, name in names.items()}

    def told(self) -> str:
        """In words, for the end of the run; empty where nothing was left out."""
        parts = [f"{self.counts[r]} {words}" for r, words in _WORDS.items() if r in self.counts]
        if not parts:
            return ""
        last = f" (the last: {self.why})" if self.why else ""
        return f"episodes left out: {', '.join(parts)}{last}"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: figures only, the same however threads ran."""
        return {"counts": self.counts, "barren": self.barren, "learned": self.learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From one."""
        self.counts, self.barren = dict(state["counts"]), state["barren"]
        self.learned = state["learned"]
