"""Episodes that reinforcement learning had to leave out: how many, why, and when that is too many.

An episode that failed never ends the run. A run that has nothing to learn from ends: soon if it has
never learned, and after a long outage if it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gearshift.errors import DataError
from gearshift.runtime.terminal import counted

Reason = Literal["environment", "overlong_prompt", "no_reward", "alone", "no_greedy"]
_WORDS: dict[Reason, str] = {
    "environment": "lost to the environment",
    "overlong_prompt": "whose prompt leaves no place for an answer",
    "no_reward": "without a reward",
    "alone": "alone in their group",
    "no_greedy": "whose greedy episode was lost",
}
_PROMPTS = 16
"""A run ends after this many prompts in a row that all gave nothing to learn from."""
_ROLLOUTS = 5
"""Once a run has learned something, it ends only after this many rollouts too, because an outage
may pass.
"""


@dataclass
class LeftOut:
    """Counts over the whole run; the checkpoints contain them."""

    counts: dict[str, int] = field(default_factory=dict)
    """Episodes by `Reason`."""
    why: str = ""
    """The reason of the last one."""
    barren: int = 0
    """The number of rollouts since the last one that gave something to learn from."""
    tried: int = 0
    """The prompts of these rollouts."""
    learned: bool = False
    """Whether there was such a rollout in this run."""

    def add(self, reason: Reason, episodes: int, why: str = "") -> None:
        """Count these episodes."""
        if episodes:
            self.counts[reason] = self.counts.get(reason, 0) + episodes
            self.why = why or self.why

    def rollout(self, prompts: int, tokens: int) -> None:
        """Record how many prompts were tried, and how much of them can be learned from."""
        self.learned = self.learned or tokens > 0
        self.barren = 0 if tokens else self.barren + 1
        self.tried = 0 if tokens else self.tried + prompts

    @property
    def hopeless(self) -> bool:
        """Whether too many prompts in a row gave nothing, so that the run ends."""
        return self.tried >= _PROMPTS and self.barren >= (_ROLLOUTS if self.learned else 1)

    def error(self) -> DataError:
        """The reason why the run ends."""
        return DataError(
            f"No episode of the last {counted(self.tried, 'prompt')} has a reward to learn from "
            f"({self.describe()}); look at the environment and the rewards."
            + (
                " What was learned before them is saved, and the same command goes on from there."
                if self.learned
                else ""
            )
        )

    def metrics(self) -> dict[str, float]:
        """The counts so far, by reason."""
        names = {r: f"left_out/{r}" for r in _WORDS} | {"environment": "environment/failures"}
        return {name: float(self.counts.get(r, 0)) for r, name in names.items()}

    def describe(self) -> str:
        """The counts in words, for the end of the run; empty if nothing was left out."""
        parts = [f"{self.counts[r]} {words}" for r, words in _WORDS.items() if r in self.counts]
        if not parts:
            return ""
        last = f" (the last: {self.why})" if self.why else ""
        return f"episodes left out: {', '.join(parts)}{last}"

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint: figures only, which do not depend on the order of threads. In
        a resumed run the count of prompts in a row starts again.
        """
        return {"counts": self.counts, "learned": self.learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.counts, self.learned = dict(state["counts"]), state["learned"]
