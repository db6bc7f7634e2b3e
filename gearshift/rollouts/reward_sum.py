"""An episode's reward: a weighted sum of the environment's own, reward models, and functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from gearshift.data.chat import render_completion
from gearshift.errors import ConfigError
from gearshift.models.classifier import score_all, use_own_pad
from gearshift.models.load import ModelConfig, load_classifier, load_tokenizer
from gearshift.rollouts.rewards import RewardFunction, combine, load_reward
from gearshift.types import Message, Trajectory

ENVIRONMENT = "environment"
_NOT_COLUMNS = frozenset({"messages", "completion", "prompt"})


class Source(Protocol):
    """A reward's source and weight, as the config names them."""

    @property
    def source(self) -> str: ...
    @property
    def weight(self) -> float: ...


class ModelReward:
    """A reward model as a reward function: the score of prompt and completion as one text."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        """Raises `ModelError` if the folder holds no classifier."""
        self.model = load_classifier(config, str(folder))
        self.tokenizer = load_tokenizer(config, str(folder))
        use_own_pad(self.model, self.tokenizer)

    def __call__(
        self, prompts: list[list[Message]], completions: list[str], **_: Any
    ) -> list[float | None]:
        sequences = []
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt_ids, completion_ids = render_completion(self.tokenizer, prompt, completion)
            sequences.append([*prompt_ids, *completion_ids])
        return list(score_all(self.model, sequences))


class RewardSum:
    """Scores trajectories. The environment's reward is always among the parts, with weight 0 if it
    is not named.
    """

    def __init__(self, sources: Sequence[Source], config: ModelConfig, reward_model: Path) -> None:
        """`reward_model`: the folder that the source `model` means. Raises `ConfigError` for an
        unknown source.
        """
        self.environment_weight = sum(s.weight for s in sources if s.source == ENVIRONMENT)
        self.functions: list[tuple[str, RewardFunction, float]] = []
        for s in sources:
            if s.source == ENVIRONMENT:
                continue
            if s.source == "model" or s.source.startswith("model:"):
                folder = Path(s.source.removeprefix("model").removeprefix(":") or reward_model)
                if not folder.is_dir():
                    raise ConfigError(
                        f"rl.rewards: there is no reward model in {folder}; "
                        "run the reward stage first."
                    )
                self.functions.append(("model", ModelReward(config, folder), s.weight))
            else:
                self.functions.append((s.source, load_reward(s.source), s.weight))

    def __call__(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[Trajectory | None], dict[str, list[float | None]]]:
        """Each trajectory with its rewards as they count (None where a part is missing), and every
        part by name.

        The environment's rewards stay at their turns, times their weight; what is added stands at
        the last token that the policy wrote.
        """
        parts: dict[str, list[float | None]] = {ENVIRONMENT: [t.reward for t in trajectories]}
        added: list[float | None] = [0.0] * len(trajectories)
        if self.functions:
            prompts = [t.info["messages"][:-1] for t in trajectories]
            completions = [t.info["completion"] for t in trajectories]
            ids = [t.token_ids[t.prompt_length :] for t in trajectories]
            names = {k for t in trajectories for k in t.info} - _NOT_COLUMNS
            columns = {name: [t.info.get(name) for t in trajectories] for name in sorted(names)}
            added, by_name = combine(self.functions, prompts, completions, ids, columns)
            parts |= by_name
        return [self._total(t, extra) for t, extra in zip(trajectories, added, strict=True)], parts

    def _total(self, trajectory: Trajectory, extra: float | None) -> Trajectory | None:
        if extra is None:
            return None
        rewards = [r * self.environment_weight for r in trajectory.rewards]
        last = max(i for i, mask in enumerate(trajectory.loss_mask) if mask)
        rewards[last] += extra
        return replace(trajectory, rewards=rewards)
