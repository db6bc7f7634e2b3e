"""The section `rl` of a recipe, in parts: what is sampled, what is rewarded, how rewards become
weights of tokens, how the policy learns from them. It must import no trainer.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gearshift.algorithms.advantages import NEEDS_GROUPS, NEEDS_VALUES
from gearshift.algorithms.policy_losses import ImportanceMode
from gearshift.data import DataConfig
from gearshift.rewards.config import RewardSource
from gearshift.runtime.config import Config, Neutral, PathText
from gearshift.runtime.optimizer import OptimizerConfig
from gearshift.runtime.terminal import counted
from gearshift.trainers.needs import PROMPT_TOKENS, Inputs, MemoryNeeds, Tree
from gearshift.trainers.presets import RLAlgorithm, rl_filled
from gearshift.trainers.rl.methods import (
    Advantage,
    PolicyLoss,
    ReinforceLoss,
    ReturnAdvantage,
    ValueNet,
)
from gearshift.trainers.stage import StageConfig
from gearshift.types import SamplingParams


class RolloutConfig(Config):
    """What a step samples."""

    prompts: int = Field(default=8, ge=1)
    """How many prompts one rollout has."""
    group_size: int = Field(default=8, ge=1, le=1 << 16)
    """How many completions each prompt gets."""
    temperature: float = Field(default=1.0, ge=1e-5, le=1e5)
    """The temperature of sampling; log-probabilities in training have it too."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling keeps the smallest set of tokens with this probability. Below 1 the sampler is not
    the policy that is trained; ratios are those of the untruncated policy."""
    max_new_tokens: int = Field(default=64, ge=1)
    """How many tokens the completion of one turn has, at most."""
    replace_zero_std: int = Field(default=0, ge=0)
    """How many further rollouts a step may make to replace groups whose rewards are all equal
    (DAPO's dynamic sampling)."""
    ahead: int = Field(default=0, ge=0)
    """How many steps the sampling is ahead of the training, at most: with 2, vLLM servers sample a
    step's episodes while the two steps before it train, on weights that lack up to two steps'
    updates. Every prompt is still sampled once, in the same order, also in a run that is resumed.
    """
    # A run that went on under `error` had no such row, so `drop` changes nothing of it.
    overlong_prompts: Neutral[Literal["error", "drop"]] = "error"
    """What happens to rows whose prompt is too long for `max_new_tokens` more tokens, or which the
    chat template refuses. `error` stops the run before its first step; `drop` leaves them out. If
    the environment has no rows, an episode with such a prompt is left out."""
    timeout: float | None = Field(default=300.0, gt=0)
    """How many seconds the environment has for one answer; if it takes longer, its episode is left
    out. null has no limit."""

    @field_validator("replace_zero_std")
    @classmethod
    def _compares(cls, rounds: int, info: ValidationInfo) -> int:
        if rounds and info.data.get("group_size") == 1:
            raise ValueError("rewards are compared inside a group; set group_size above 1.")
        return rounds


class ShapingConfig(Config):
    """What changes the rewards before the advantage reads them."""

    clip: float | None = Field(default=None, gt=0)
    """The largest absolute value of a reward: larger ones are clipped to it before the KL is
    subtracted. null does not clip."""
    mask_truncated_completions: bool = False
    """Whether completions that reached `max_new_tokens` are left out of the loss (DAPO's overlong
    filtering)."""
    missing_eos_penalty: float = Field(default=0.0, ge=0)
    """The number that is subtracted from the reward of a completion that reached `max_new_tokens`.
    """
    overlong_buffer: float = Field(default=0.0, ge=0, le=1)
    """The share of `max_new_tokens`, at its end, in which the reward falls with each token, by up
    to 1 in each turn (DAPO's soft punishment); with 0 it does not fall."""


class KLConfig(Config):
    """How the policy is kept near the reference."""

    beta: float = Field(default=0.02, ge=0)
    """The weight of the KL; with 0 no reference model is loaded."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the KL is estimated from sampled tokens; with `where: loss` use k2, or set `ratio` with
    k1 or k3."""
    where: Literal["reward", "loss"] = "reward"
    """Whether the KL is subtracted from each token's reward, or added to the loss."""
    ratio: bool = False
    """With `where: loss`, whether the estimate is multiplied by the ratio of the policy to the
    sampler, so that its gradient is that of KL(policy, reference) for every sampler. Without it k3
    has the gradient of another divergence, and is biased if the sampler is an older policy."""
    reference: PathText | None = None
    """The reference policy, with the same vocabulary: a folder or a name, for example of a teacher
    to distil from. null is the policy at the start of the stage."""
    target: float | None = Field(default=None, gt=0)
    """The KL of a completion, in nats, to which beta is adapted (Ziegler et al. 2019); null keeps
    beta."""
    horizon: int = Field(default=10_000, ge=1)
    """How many completions beta takes to adapt to `target`."""

    @field_validator("ratio", "reference", "target", "horizon")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        name, known = str(info.field_name), info.data
        if value == cls.model_fields[name].default:
            return value
        if name == "ratio" and known.get("where") == "reward":
            raise ValueError("it multiplies a KL in the loss; set where=loss, or leave it out.")
        if known.get("beta") == 0:
            raise ValueError("beta is 0, so there is no KL; set kl.beta, or leave it out.")
        if name == "horizon" and known.get("target") is None:
            raise ValueError("only a target adapts beta; set kl.target, or leave it out.")
        return value

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Self:
        if self.beta and (self.where, self.estimator, self.ratio) == ("loss", "k1", False):
            raise ValueError(
                "k1 has no gradient in the loss; take estimator=k2, or ratio=true, or where=reward."
            )
        return self


class ImportanceConfig(Config):
    """A correction for a sampler that is not the policy: another program, or older weights."""

    mode: ImportanceMode
    """Whether a large ratio of the policy to the sampler is truncated or masked, and whether the
    ratio is that of each token or of each completion."""
    cap: float = Field(default=2.0, ge=1)
    """The largest ratio that stays as it is: a larger one is truncated to it, or masked. A mask
    also removes ratios below 1 / cap."""


class SFTMixConfig(Config):
    """Labelled examples that each update learns from besides the rollout, so that what supervised
    tuning taught is not lost (PPO-ptx; Ouyang et al. 2022).
    """

    data: DataConfig = DataConfig()
    """The labelled examples."""
    weight: float = Field(default=1.0, gt=0)
    """The weight of the labelled examples' mean token loss, which is added to the policy loss."""
    batch_size: int = Field(default=8, ge=1)
    """How many labelled examples each update has."""
    max_length: int = Field(default=1024, ge=2)
    """How many tokens a labelled example may have; longer examples are refused."""


class UpdateConfig(Config):
    """How a rollout becomes optimizer steps."""

    epochs: int = Field(default=1, ge=1)
    """How often the updates pass over one rollout."""
    minibatches: int = Field(default=1, ge=1)
    """How many updates one pass has, at most one for each prompt."""
    micro_batch_tokens: int = Field(default=4096, ge=0)
    """How many tokens one micro-batch has, at most. This limits the memory and does not change the
    gradient. With 0 it is as many as fit into the memory when the stage begins."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=5)
    """The optimizer of the policy."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """The decay of a moving average of the policy's weights, which is saved in the stage's folder
    `ema`; null keeps no average."""


class RLConfig(StageConfig):
    """Step 3: reinforcement learning."""

    algorithm: Neutral[RLAlgorithm | None] = Field(default=None, exclude=True)
    """A published method by name, which sets the other keys of this section; the same as the
    recipe's own `algorithm`."""
    steps: int = Field(default=60, ge=1)
    """How many rollouts the stage makes; each is followed by its updates."""
    rollout: RolloutConfig = RolloutConfig()
    """What a step samples."""
    rewards: tuple[RewardSource, ...] = (RewardSource(),)
    """The rewards, whose weighted sum is maximised; the environment's own reward is always logged.
    """
    shaping: ShapingConfig = ShapingConfig()
    """What changes the rewards before the advantage reads them."""
    advantage: Advantage = Field(
        default=ReturnAdvantage(name="value_baseline"), discriminator="name"
    )
    """The function that turns rewards into a weight for each token."""
    loss: PolicyLoss = Field(default=ReinforceLoss(), discriminator="name")
    """The policy loss."""
    value: ValueNet | None = Field(default=None, discriminator="kind")
    """The value net, for an advantage that needs one (`value_baseline`, `gae`). null is that of the
    `algorithm`, or a head on the policy if it has none."""
    kl: KLConfig = KLConfig()
    """Penalty on the distance to the reference policy."""
    importance: ImportanceConfig | None = None
    """The correction for a sampler that is not the policy; null has none."""
    sft_mix: SFTMixConfig | None = None
    """Labelled examples that are added to each update; null adds none."""
    update: UpdateConfig = UpdateConfig()
    """How a rollout becomes optimizer steps."""
    record_figures: Neutral[bool] = True
    """Whether `rollouts.jsonl` has figures for each token: log-probabilities, advantages, versions
    of the weights. They take about 30 bytes a token."""

    micro_batch_key: ClassVar[str] = "update.micro_batch_tokens"

    @classmethod
    def filled(cls, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree with what its `algorithm` stands for."""
        return rl_filled(tree)

    @field_validator("advantage")
    @classmethod
    def _has_groups(cls, advantage: Any, info: ValidationInfo) -> Any:
        rollout = info.data.get("rollout")
        if rollout and rollout.group_size == 1 and advantage.name in NEEDS_GROUPS:
            raise ValueError(
                f"{advantage.name} compares completions of one prompt; "
                "rollout.group_size must be 2 or more."
            )
        return advantage

    @field_validator("value", mode="before")
    @classmethod
    def _is_asked_for(cls, value: Any, info: ValidationInfo) -> Any:
        advantage = info.data.get("advantage")
        if value is None or advantage is None:
            return None
        if advantage.name not in NEEDS_VALUES:
            raise ValueError(
                f"the advantage {advantage.name} uses no values; leave it out, or take "
                "advantage.name=gae or value_baseline."
            )
        return value

    @field_validator("value")
    @classmethod
    def _trains_the_policy(cls, value: Any, info: ValidationInfo) -> Any:
        steps = info.data.get("steps")
        if value and steps is not None and value.warmup > steps:
            raise ValueError(
                f"warmup={value.warmup} is more than steps={steps}, so the policy would never "
                "train; lower it, or raise rl.steps."
            )
        return value

    @field_validator("update")
    @classmethod
    def _has_prompts(cls, update: UpdateConfig, info: ValidationInfo) -> UpdateConfig:
        rollout = info.data.get("rollout")
        if rollout and update.minibatches > rollout.prompts:
            raise ValueError(
                f"minibatches={update.minibatches} cannot be made of prompts={rollout.prompts}; "
                "a minibatch has one prompt at least."
            )
        return update

    @property
    def updates(self) -> int:
        """Optimizer steps in all."""
        return self.steps * self.updates_a_step

    @property
    def updates_a_step(self) -> int:
        """Optimizer steps after one rollout."""
        return self.update.epochs * self.update.minibatches

    def describe(self) -> str:
        """What the stage does, in a few words."""
        kl = self.kl
        weight = f"KL {kl.estimator} x {kl.beta:g} in the {kl.where}" if kl.beta else "no KL"
        return (
            f"{counted(self.steps, 'step')} of {counted(self.rollout.prompts, 'prompt')} x "
            f"{counted(self.rollout.group_size, 'completion')}, "
            f"advantage {self.advantage.name}, loss {self.loss.name}, "
            f"{counted(self.updates_a_step, 'update')} a step, {weight}"
        )

    def inputs(self) -> Inputs:
        """What the stage reads."""
        models = [getattr(self.value, "init_from", None), self.kl.reference]
        functions = []
        for part in self.rewards:
            kind, _, folders = part.source.partition(":")
            if kind == "model":
                models += (folders or "reward").split(",")
            else:
                functions.append(part.source)
        learned = (self.sft_mix.data,) if self.sft_mix else ()
        return Inputs(learned, (), tuple(filter(None, models)), tuple(functions), task=True)

    def memory_needs(self) -> MemoryNeeds:
        """What the stage's memory depends on."""
        rollout, update = self.rollout, self.update
        tokens = rollout.prompts * (PROMPT_TOKENS + rollout.group_size * rollout.max_new_tokens)
        return MemoryNeeds(
            update.optimizer,
            update.micro_batch_tokens,
            -(-tokens // update.minibatches),
            Tree(PROMPT_TOKENS, rollout.group_size, rollout.max_new_tokens),
            reference=self.kl.beta > 0,
            critic=self.value.optimizer if self.value and self.value.kind == "critic" else None,
            rollout=(
                rollout.prompts * rollout.group_size,
                PROMPT_TOKENS + rollout.max_new_tokens,
            ),
        )

    def with_micro_batch(self, tokens: int) -> Self:
        """The config with micro-batches of so many tokens."""
        update = self.update.model_copy(update={"micro_batch_tokens": tokens})
        return self.model_copy(update={"update": update})

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is a cost of each token."""
        return self.kl.beta > 0 and self.kl.where == "reward"

    def sampling(self) -> SamplingParams:
        """How rollouts are sampled."""
        rollout = self.rollout
        return SamplingParams(
            n=rollout.group_size,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_new_tokens=rollout.max_new_tokens,
        )
