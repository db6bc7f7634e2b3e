"""Episodes that reinforcement learning had to leave out: how many, why, and when that is too many.

One that failed costs itself and never the run; a run that learns from nothing at all ends, at once
if it never did, and after an outage that lasts if it did.
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
_PROMPTS = 16
"""Prompts in a row from which a run ends, if all came to nothing."""
_ROLLOUTS = 5
"""So many rollouts too, once something was learned: an outage passes."""


@dataclass
class LeftOut:
    """Counts over the whole run: they are in its checkpoints."""

    counts: dict[str, int] = field(default_factory=dict)
    """Episodes by `Reason`."""
    why: str = ""
    """What the last of them was lost to."""
    barren: int = 0
    """Rollouts since the last one that there was something to learn from."""
    tried: int = 0
    """Their prompts."""
    learned: bool = False
    """Whether there was such a rollout in this run."""

    def add(self, reason: Reason, episodes: int, why: str = "") -> None:
        """Count these episodes."""
        if episodes:
            self.counts[reason] = self.counts.get(reason, 0) + episodes
            self.why = why or self.why

    def rollout(self, prompts: int, tokens: int) -> None:
        """So many prompts were tried, and this much was learned from."""
        self.learned = self.learned or tokens > 0
        self.barren = 0 if tokens else self.barren + 1
        self.tried = 0 if tokens else self.tried + prompts

    @property
    def hopeless(self) -> bool:
        """Whether so many prompts in a row came to nothing that the run ends."""
        return self.tried >= _PROMPTS and self.barren >= (_ROLLOUTS if self.learned else 1)

    def error(self) -> DataError:
        """Why it ends."""
        return DataError(
            f"No episode of the last {self.tried} prompts has a reward to learn from "
            f"({self.describe()}); look at the environment and the rewards."
            + (
                " What was learned before them is saved, and the same command goes on from there."
                if self.learned
                else ""
            )
        )

    def metrics(self) -> dict[str, float]:
        """So far, by reason."""
        names = {r: f"left_out/{r}" for r in _WORDS} | {"environment": "environment/failures"}
        return {name: float(self.counts.get(r, 0)) for r, name in names.items()}

    def describe(self) -> str:
        """In words, for the end of the run; empty where nothing was left out."""
        parts = [f"{self.counts[r]} {words}" for r, words in _WORDS.items() if r in self.counts]
        if not parts:
            return ""
        last = f" (the last: {self.why})" if self.why else ""
        return f"episodes left out: {', '.join(parts)}{last}"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: figures only, the same however threads ran. A run that is taken up
        again has its patience anew.
        """
        return {"counts": self.counts, "learned": self.learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From one."""
        self.counts, self.learned = dict(state["counts"]), state["learned"]
