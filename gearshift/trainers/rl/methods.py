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
    """Whether advantages are scaled to mean 0 and variance 1: over the rollout (`batch`), in each
    group (`group`), or not at all (`none`)."""
    positive_only: bool = False
    """Whether negative advantages become 0, so that only samples above their baseline are learned
    from, as in rejection sampling (RAFT, Dong et al. 2023). This is not the policy gradient, but it
    has less noise if there are few samples."""

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
    """The discount of a reward for each token between the action and the reward."""


class MovingAverageAdvantage(AdvantageBase):
    """The rewards to come, less the moving average of returns."""

    name: Literal["moving_average"] = "moving_average"
    """The function that turns rewards into a weight for each token."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """The discount of a reward for each token between the action and the reward."""
    decay: float = Field(default=0.9, ge=0, lt=1)
    """The weight of the old average after each rollout; the rollout's own mean has the rest."""


class GAE(AdvantageBase):
    """Generalised advantage estimation, from a value net."""

    name: Literal["gae"] = "gae"
    """The function that turns rewards into a weight for each token."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """The discount of a reward for each token between the action and the reward."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """The lambda of GAE: with 0 an advantage uses one reward and the value net's next prediction;
    with 1 it uses all rewards to come."""


class LossBase(Config):
    name: str
    aggregation: Aggregation = "token_mean"
    """How the loss of the tokens becomes one number. `token_mean`: each token has the same weight.
    `sequence_mean`: each completion has the same weight. `fixed_length`: the sum over the tokens,
    divided by `max_new_tokens` for each completion."""

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
    """The ratio of a token is clipped to at least 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio of a token is clipped to at most 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """The largest ratio that counts if the advantage is negative; null has no limit."""


class GSPOLoss(LossBase):
    """PPO's clip of one ratio for each completion."""

    name: Literal["gspo"] = "gspo"
    """The policy loss."""
    clip_low: float = Field(default=3e-4, gt=0)
    """The ratio of a completion is clipped to at least 1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0)
    """The ratio of a completion is clipped to at most 1 + clip_high."""


class CISPOLoss(LossBase):
    """Policy gradient with a clipped weight, so that no token loses its gradient."""

    name: Literal["cispo"] = "cispo"
    """The policy loss."""
    clip_low: float = Field(default=1.0, gt=0)
    """The weight of a token is clipped to at least 1 - clip_low."""
    clip_high: float = Field(default=4.0, gt=0)
    """The weight of a token is clipped to at most 1 + clip_high."""


class SAPOLoss(LossBase):
    """A soft gate in place of the clip."""

    name: Literal["sapo"] = "sapo"
    """The policy loss."""
    tau_positive: float = Field(default=1.0, gt=0)
    """How fast the gate of a positive advantage closes as the ratio moves away from 1."""
    tau_negative: float = Field(default=1.05, gt=0)
    """How fast the gate of a negative advantage closes as the ratio moves away from 1."""


class ValueBase(Config):
    kind: str
    warmup: int = Field(default=0, ge=0)
    """How many rollouts at the beginning train only the value net; the policy's schedule begins
    after them."""
    coefficient: float = Field(default=0.5, ge=0)
    """The weight of the value loss."""
    clip: float | None = Field(default=None, gt=0)
    """How far a value may move from its value before the update; null has no limit."""


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
    """The model from which the critic starts: a folder, or `reward` (this run's reward model); null
    is the policy. A critic that is an encoder gives one value for the prompt, a decoder gives one
    for each token."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """The optimizer of the critic."""


Advantage = GroupAdvantage | ReturnAdvantage | MovingAverageAdvantage | GAE
PolicyLoss = ReinforceLoss | PPOClipLoss | GSPOLoss | CISPOLoss | SAPOLoss
ValueNet = ValueHeadConfig | CriticConfig
