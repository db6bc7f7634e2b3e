"""The sections `advantage`, `loss` and `value` of `rl`: each kind has a class with the keys that it
reads and no others, so that a recipe cannot set what its method does not use.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from gearshift.algorithms.normalize import Aggregation
from gearshift.runtime.config import Config, PathText
from gearshift.runtime.optimizer import OptimizerConfig


class AdvantageBase(Config):
    name: str
    whiten: Literal["none", "batch", "group"] = "none"
    """Bring the advantages of the rollout, or of each group, to mean 0 and variance 1."""
    positive_only: bool = False
    """Learn only from what beat its baseline, as rejection sampling does (RAFT, Dong et al. 2023).
    This is not the policy gradient, but it has less noise where samples are few."""

    def parameters(self) -> dict[str, Any]:
        """What the advantage function takes besides the rollout."""
        return self.model_dump(exclude={"name", "whiten", "positive_only"})


class GroupAdvantage(AdvantageBase):
    """An advantage that compares the completions of a prompt."""

    name: Literal["rloo", "grpo", "dr_grpo", "grpo_turns", "opo", "best_of_n"]
    """The function that turns rewards into a weight for each token."""


class ReturnAdvantage(AdvantageBase):
    """The rewards to come, less a value net's prediction (`value_baseline`), the greedy
    completion's reward (`remax`) or nothing (`none`).
    """

    name: Literal["none", "value_baseline", "remax"]
    """The function that turns rewards into a weight for each token."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount from token to token."""


class MovingAverageAdvantage(AdvantageBase):
    """The rewards to come, less the moving average of returns."""

    name: Literal["moving_average"] = "moving_average"
    """The function that turns rewards into a weight for each token."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount from token to token."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """The part of the old average that each rollout keeps."""


class GAE(AdvantageBase):
    """Generalised advantage estimation, from a value net."""

    name: Literal["gae"] = "gae"
    """The function that turns rewards into a weight for each token."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount from token to token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """Lambda of GAE: 0 trusts the value net after one token, 1 the rewards alone."""


class LossBase(Config):
    name: str
    aggregation: Aggregation = "token_mean"
    """Whether each token or each completion counts the same; or each token, over `max_new_tokens`
    for each completion (`fixed_length`)."""

    def parameters(self) -> dict[str, Any]:
        """What the loss function takes besides tensors."""
        return self.model_dump(exclude={"name", "aggregation"})


class ReinforceLoss(LossBase):
    """The policy gradient."""

    name: Literal["reinforce"] = "reinforce"
    """The policy loss."""


class PPOClipLoss(LossBase):
    """PPO's clip of each token's ratio."""

    name: Literal["ppo_clip"] = "ppo_clip"
    """The policy loss."""
    clip_low: float = Field(default=0.2, gt=0)
    """The ratio stays above 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio stays below 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the ratio counts for at most this; null has no bound."""


class GSPOLoss(LossBase):
    """PPO's clip of one ratio for each completion."""

    name: Literal["gspo"] = "gspo"
    """The policy loss."""
    clip_low: float = Field(default=3e-4, gt=0)
    """The completion's ratio stays above 1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0)
    """The completion's ratio stays below 1 + clip_high."""


class CISPOLoss(LossBase):
    """Policy gradient with a clipped weight, so that no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    """The policy loss."""
    clip_low: float = Field(default=1.0, gt=0)
    """The weight stays above 1 - clip_low."""
    clip_high: float = Field(default=4.0, gt=0)
    """The weight stays below 1 + clip_high."""


class SAPOLoss(LossBase):
    """A soft gate in place of the clip."""

    name: Literal["sapo"] = "sapo"
    """The policy loss."""
    tau_positive: float = Field(default=1.0, gt=0)
    """How sharply a positive advantage's gate closes away from ratio 1."""
    tau_negative: float = Field(default=1.05, gt=0)
    """How sharply a negative advantage's gate closes away from ratio 1."""


class ValueBase(Config):
    kind: str
    warmup: int = Field(default=0, ge=0)
    """Rollouts from which only the value net learns; the policy's schedule begins after them."""
    coefficient: float = Field(default=0.5, ge=0)
    """Weight of the value loss."""
    clip: float | None = Field(default=None, gt=0)
    """Values stay within this distance of those before the update; null has no bound."""


class ValueHeadConfig(ValueBase):
    """A value head on the policy."""

    kind: Literal["head"] = "head"
    """Whether values come from a head on the policy, or from a model of their own."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    """The optimizer of the head."""


class CriticConfig(ValueBase):
    """A value net with weights of its own."""

    kind: Literal["critic"] = "critic"
    """Whether values come from a head on the policy, or from a model of their own."""
    init_from: PathText | None = None
    """The model that the critic starts from: a folder, or `reward` (this run's reward model); null
    is the policy. An encoder values the prompt, a decoder each token."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """The optimizer of the critic."""


Advantage = GroupAdvantage | ReturnAdvantage | MovingAverageAdvantage | GAE
PolicyLoss = ReinforceLoss | PPOClipLoss | GSPOLoss | CISPOLoss | SAPOLoss
ValueNet = ValueHeadConfig | CriticConfig
