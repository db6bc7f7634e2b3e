"""The reinforcement-learning loop: sample prompts, collect, score, advantages, update.

With the defaults this is REINFORCE with a learned baseline (advantage = reward - value), a penalty
on the KL to the reference, and one update a rollout. Every other method is another name in the
config: an advantage function that gives each token its weight, and a loss that consumes the
weights. The loop does not know which. How it differs from the textbook: the gradient is normalised
over the whole rollout however it is cut into micro-batches; a group's prompt is computed once;
dropout is off, so that the first ratio is exactly 1.
Legend: T packed tokens, N completions, A longest completion, M tokens that the policy wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, Literal, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gearshift.algorithms.advantages import (
    ADVANTAGES,
    NEEDS_GREEDY,
    NEEDS_GROUPS,
    NEEDS_VALUES,
    Rollout,
    moving_average,
)
from gearshift.algorithms.kl import KL_ESTIMATORS, adaptive_beta, with_ratio
from gearshift.algorithms.normalize import (
    Aggregation,
    loss_weights,
    pad_rows,
    row_mask,
    unpad_rows,
    whiten,
    whiten_groups,
)
from gearshift.algorithms.policy_losses import (
    POLICY_LOSSES,
    ImportanceMode,
    Limits,
    importance_weights,
    mismatch,
    value_loss,
)
from gearshift.algorithms.shaping import clip_rewards, overlong_penalty, token_rewards
from gearshift.batch import PackedBatch
from gearshift.data import DataConfig, Mixture
from gearshift.engine import Engine
from gearshift.models.adapters import adapters_off
from gearshift.models.heads import ValueHead
from gearshift.models.logprobs import TokenScores
from gearshift.models.runner import ModelRunner
from gearshift.rewards.config import RewardSource
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec, Rewarded
from gearshift.runtime.config import Config, Neutral, PathText
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.seeding import generator, named_seed
from gearshift.trainers.ema import MovingAverage
from gearshift.trainers.left_out import LeftOut
from gearshift.trainers.rl.batching import (
    Parts,
    by_group,
    describe_generation,
    describe_rollout,
    given_rewards,
    has_zero_std,
    minibatches,
    pack_trajectories,
    place_rewards,
    record,
    turn_ends,
)
from gearshift.trainers.rl.critic import Critic
from gearshift.trainers.sft import Rendered, supervised_batch, supervised_loss
from gearshift.trainers.stage import Stage, StageConfig
from gearshift.trainers.update import update
from gearshift.types import SamplingParams, Trajectory

Advantage = Literal[
    "returns", "reinforce", "moving_average", "gae", "rloo", "grpo", "dr_grpo", "grpo_turns",
    "remax", "opo", "best_of_n",
]  # fmt: skip
PolicyLossName = Literal["reinforce", "ppo_clip", "gspo", "cispo", "sapo"]


class KLConfig(Config):
    """Keeping the policy near the reference."""

    beta: float = Field(0.02, ge=0)
    """Weight of the KL; at 0 no reference model is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the KL is estimated from sampled tokens; in the loss use k2, or `ratio` with k1 or k3."""
    where: Literal["reward", "loss"] = "reward"
    """Subtract it from each token's reward, or add it to the loss."""
    ratio: bool = False
    """In the loss: times the ratio to the policy that sampled, so that the gradient is that of
    KL(policy, reference), on policy or off. Without it k3 pulls towards the reference by another
    divergence's gradient, and is biased off policy.
    """
    reference: PathText | None = None
    """The reference policy, of the same vocabulary: a folder or name (a teacher to distil from);
    null is the policy as it starts."""
    target: float | None = Field(None, gt=0)
    """Nats a completion that beta is adapted to (Ziegler et al. 2019); null keeps beta."""
    horizon: int = Field(10_000, ge=1)
    """Completions over which beta adapts."""

    @model_validator(mode="after")
    def _has_a_gradient(self) -> Self:
        if self.beta and (self.where, self.estimator, self.ratio) == ("loss", "k1", False):
            raise ValueError(
                "k1 has no gradient in the loss; take estimator=k2, or ratio=true, or where=reward."
            )
        return self


class SupervisedMix(Config):
    """Labelled examples that each update learns from besides the rollout, so that what supervised
    tuning taught is not lost (PPO-ptx; Ouyang et al. 2022).
    """

    data: DataConfig = DataConfig()
    """The examples; none to leave it."""
    weight: float = Field(1.0, gt=0)
    """Of their mean token loss, beside the policy loss."""
    batch_size: int = Field(8, ge=1)
    """Examples beside each update."""
    max_length: int = Field(1024, ge=2)
    """Longer examples are refused."""


class RLConfig(StageConfig):
    """Step 3: reinforcement learning."""

    steps: int = Field(60, ge=1)
    """Rollouts, each followed by its updates."""
    prompts: int = Field(8, ge=1)
    """Prompts in one rollout."""
    group_size: int = Field(8, ge=1, le=1 << 16)
    """Completions of each prompt."""
    # What went on under `error` had no such row, so that `drop` changes nothing of it.
    overlong_prompts: Neutral[Literal["error", "drop"]] = "error"
    """Rows whose prompt leaves no place for `max_new_tokens`, or that the chat template refuses:
    told before the first step, or left out. Where the environment has no rows, an episode with such
    a prompt is left out when it comes."""
    temperature: float = Field(1.0, ge=1e-5, le=1e5)
    """Of sampling, and so of the policy that is trained."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 the sampler is not the policy that is trained; ratios stay about the untruncated
    policy.
    """
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer of one turn."""
    episode_timeout: float | None = Field(300.0, gt=0)
    """Seconds for one answer of the environment; one that takes longer loses its episode. null
    waits for ever."""
    rewards: tuple[RewardSource, ...] = (RewardSource(),)
    """What is rewarded; the environment's own reward is logged in any case."""
    reward_clip: float | None = Field(None, gt=0)
    """Rewards are kept within this of zero, before the KL is subtracted."""
    truncated: Literal["keep", "mask"] = "keep"
    """A completion that was cut at its longest: learn from it as from others, or leave it out of
    the loss (DAPO's overlong filtering).
    """
    missing_end_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a completion that was cut."""
    overlong_buffer: float = Field(0.0, ge=0, le=1)
    """This part of `max_new_tokens`, the last, costs up to 1 in each turn (DAPO's soft
    punishment)."""
    dynamic_sampling: int = Field(0, ge=0)
    """Further rollouts, at most, to replace groups whose rewards are all equal (DAPO)."""
    advantage: Advantage = "reinforce"
    """How rewards become weights of tokens."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount from token to token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalised advantage estimation."""
    baseline_decay: float = Field(0.9, ge=0, lt=1)
    """Of the baseline of `moving_average`."""
    positive_only: bool = False
    """Learn from what beat its baseline and leave the rest, as rejection sampling does (RAFT, Dong
    et al. 2023). Not the policy gradient, but less noise where samples are few."""
    whiten: Literal["none", "batch", "group"] = "none"
    """Bring the advantages of the rollout, or of each group, to mean 0 and variance 1."""
    value: Literal["head", "critic"] = "head"
    """The value net, where the advantage needs one: a head on the policy, or a separate model."""
    critic: PathText | None = None
    """What a separate critic starts from: a folder, or `reward` (this run's reward model); null is
    the policy. An encoder values the prompt, a decoder each token."""
    critic_warmup: int = Field(0, ge=0)
    """Rollouts from which only the value net learns; the policy's schedule begins after them."""
    value_coefficient: float = Field(0.5, ge=0)
    """Weight of the value loss."""
    value_clip: float | None = Field(None, gt=0)
    """Values stay within this of those before the update."""
    value_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    """Of the value head, or of the critic (where 1e-5 is a better rate)."""
    loss: PolicyLossName = "reinforce"
    """The policy loss."""
    clip_low: float = Field(0.2, gt=0)
    """The ratio stays above 1 - clip_low (`ppo_clip`, `gspo`, `cispo`)."""
    clip_high: float = Field(0.2, gt=0)
    """The ratio stays below 1 + clip_high."""
    dual_clip: float | None = Field(None, gt=1)
    """`ppo_clip`: where the advantage is negative, the ratio counts for at most this."""
    tau_positive: float = Field(1.0, gt=0)
    """`sapo`: how sharply a positive advantage's gate closes away from ratio 1."""
    tau_negative: float = Field(1.05, gt=0)
    """`sapo`: the same of a negative one."""
    importance: Literal["none"] | ImportanceMode = "none"
    """Correct for a sampler that is not the policy (another program, older weights): truncate or
    mask the ratio of each token, or of each completion.
    """
    importance_cap: float = Field(2.0, ge=1)
    """Where it is truncated, or masked (below 1 / cap too)."""
    aggregation: Aggregation = "token_mean"
    """Whether each token or each completion counts the same; or each token, over `max_new_tokens`
    for each completion (`fixed_length`).
    """
    epochs: int = Field(1, ge=1)
    """Passes over one rollout."""
    minibatches: int = Field(1, ge=1)
    """Updates in one pass, at most one for each prompt."""
    kl: KLConfig = KLConfig()
    """Penalty on the distance to the reference policy."""
    supervised: SupervisedMix = SupervisedMix()
    """Labelled examples mixed into each update."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the policy, saved beside it in `ema`; null keeps none."""
    micro_batch_tokens: int = Field(4096, ge=0)
    """Tokens in one micro-batch; bounds memory, does not change the gradient. 0: as many as the
    memory has room for when the stage begins."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=5)
    """Of the policy."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.group_size == 1 and self.advantage in NEEDS_GROUPS:
            raise ValueError(
                f"advantage={self.advantage} compares completions of one prompt; "
                "group_size must be 2 or more."
            )
        if self.minibatches > self.prompts:
            raise ValueError(
                f"minibatches={self.minibatches} cannot be made of prompts={self.prompts}; "
                "a minibatch has one prompt at least."
            )
        if self.group_size == 1 and self.dynamic_sampling:
            raise ValueError(
                "dynamic_sampling compares rewards in a group; set group_size above 1."
            )
        return self

    @property
    def updates(self) -> int:
        """Optimizer steps in all."""
        return self.steps * self.epochs * self.minibatches

    def sampling(self) -> SamplingParams:
        """How rollouts are sampled."""
        return SamplingParams(
            n=self.group_size,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
        )

    def limits(self) -> Limits:
        """What the policy loss reads."""
        return Limits(
            self.clip_low, self.clip_high, self.dual_clip, self.tau_positive, self.tau_negative
        )


class Scorer(Protocol):
    """Gives trajectories their rewards: `CompositeReward`. What it keeps goes into checkpoints."""

    missing: dict[str, float]
    """By a part's name, the share of the episodes of the last call whose reward was lost."""
    environment_weight: float
    """Of the environment's own reward; 0 where it does not count."""
    last_failure: str
    """Why a reward was lost, where that is known."""

    def begin(self, group: list[Trajectory]) -> None:
        """Hear of a group that has ended, while others still run."""

    def __call__(self, trajectories: Sequence[Trajectory]) -> tuple[list[Trajectory | None], Parts]:
        """Each with its rewards as they count (None: it has none), and every part of them."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


@dataclass
class Memory:
    """What adapts from rollout to rollout."""

    beta: float
    """Weight of the KL."""
    baseline: float | None = None
    """Moving average of the returns."""

    def state_dict(self) -> dict[str, float | None]:
        """For a checkpoint."""
        return {"beta": self.beta, "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From one."""
        self.beta, self.baseline = state["beta"], state["baseline"]


class RLTrainer:
    """Holds what lives across steps; `train` is the loop."""

    def __init__(
        self,
        config: RLConfig,
        engine: Engine,
        collector: Collector,
        rows: Sequence[int] | None,
        score: Scorer,
        stage: Stage,
        reference: ModelRunner | None = None,
        critic: Critic | None = None,
        examples: Mixture[Rendered] | None = None,
    ) -> None:
        """`rows`: those that the environment draws from, or None where each episode is drawn by
        its seed. `reference` is needed where `kl.beta` > 0; `critic` where `value` is `critic`;
        `examples` are mixed into the updates.
        """
        self.examples = examples
        self.config, self.engine, self.collector = config, engine, collector
        self.rows, self.score, self.stage, self.reference = rows, score, stage, reference
        self.memory, self.left_out = Memory(config.kl.beta), LeftOut()
        has_values = config.advantage in NEEDS_VALUES
        updates = config.updates
        if has_values:  # the policy has no part in the value net's warm-up
            updates -= min(config.critic_warmup, config.steps) * config.epochs * config.minibatches
        self.optimizers = [MasterAdamW(engine.model.parameters(), config.optimizer, updates)]
        stage.track(model=engine.model, optimizer=self.optimizers[0], memory=self.memory)
        stage.track(rewards=score, left_out=self.left_out)
        self.head: ValueHead | None = None
        self.critic: Critic | None = None
        if has_values:
            self._add_value_net(critic)
        self.average = MovingAverage(engine.model, config.ema) if config.ema else None
        if self.average:
            stage.track(average=self.average)

    def _add_value_net(self, critic: Critic | None) -> None:
        config = self.config
        if config.value == "critic":
            if critic is None:
                raise ValueError("value=critic needs a critic.")
            self.critic = critic
            self.stage.track(**critic.modules)
            parameters = critic.parameters()
        else:
            self.head = ValueHead(self.engine.head.linear.in_features).to(self.engine.device)
            self.stage.track(value_head=self.head)
            parameters = list(self.head.parameters())
        self.optimizers.append(MasterAdamW(parameters, config.value_optimizer, config.updates))
        self.stage.track(value_optimizer=self.optimizers[1])

    def train(self) -> None:
        """Sample prompts, collect, score, advantages, update; until the stage's last step."""
        for step in self.stage.steps(on_resume=self.engine.weights_changed):
            trajectories, metrics = self.rollout(step)
            tokens = 0
            if trajectories:
                tokens, learned = self.learn(step, trajectories)
                metrics |= learned
            self.left_out.rollout(self.config.prompts, tokens)
            metrics |= self.left_out.metrics()
            metrics |= describe_generation(self.engine.loop) | self.adapt(
                metrics, len(trajectories)
            )
            self.stage.log(step, metrics, tokens)
            if self.left_out.hopeless:
                if self.left_out.learned:  # these rollouts changed nothing, and are run again
                    self.stage.save(step + 1 - self.left_out.barren)
                self.stage.forget()
                raise self.left_out.error()
        if not self.left_out.learned:
            self.stage.forget()
            raise self.left_out.error()

    def learn(self, step: int, trajectories: list[Trajectory]) -> tuple[int, dict[str, float]]:
        """Advantages, and the updates; returns the tokens of the batch, and metrics."""
        greedy = None
        if self.config.advantage in NEEDS_GREEDY:
            greedy = self.greedy(step, {t.group_id for t in trajectories})
            known = [t for t in trajectories if t.group_id in greedy]
            self.left_out.add("no_greedy", len(trajectories) - len(known))
            trajectories = known
        if not trajectories:
            return 0, {}
        batch = pack_trajectories(trajectories, self.config.micro_batch_tokens).to(
            self.engine.device
        )
        with self.stage.phase("score"):
            batch, scored = self.with_advantages(batch, trajectories, greedy)
        with self.stage.phase("train"):
            return len(batch), scored | self.update(batch, step)

    def rollout(self, step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """Episodes with their rewards, to learn from, and what to log of all that were sampled.

        Under `dynamic_sampling` groups that teach nothing are replaced, if that many rollouts find
        others.
        """
        kept: dict[int, list[Trajectory]] = {}
        everything: list[Trajectory] = []
        all_parts: Parts = {}
        missing: dict[str, list[float]] = {}
        rounds = 1 + self.config.dynamic_sampling
        for nth in range(rounds):
            trajectories, parts = self.collect(self.starts(step, nth), self.config.sampling())
            everything += trajectories
            for name, values in parts.items():
                all_parts.setdefault(name, []).extend(values)
            for name, share in self.score.missing.items():
                missing.setdefault(name, []).append(share)
            groups = by_group(trajectories)
            if rounds > 1:
                groups = {g: members for g, members in groups.items() if not has_zero_std(members)}
            kept |= groups
            if len(kept) >= self.config.prompts:
                break
        enough = list(kept.values())[: self.config.prompts]
        chosen = self.comparable(enough or by_group(everything).values())
        metrics = describe_rollout(everything, all_parts)
        metrics |= {f"rewards/{name}/missing": fmean(shares) for name, shares in missing.items()}
        if rounds > 1:
            metrics["sampling/rollouts"] = nth + 1.0
        self.stage.rollouts.append(step, {"episodes": [record(t) for t in everything]})
        return [t for group in chosen for t in group], metrics

    def comparable(self, groups: Iterable[list[Trajectory]]) -> list[list[Trajectory]]:
        """The groups without those that have shrunk to one episode, where an advantage compares:
        alone it has no baseline.
        """
        if self.config.advantage not in NEEDS_GROUPS:
            return list(groups)
        several = [group for group in groups if len(group) > 1]
        self.left_out.add("alone", sum(len(group) == 1 for group in groups))
        return several

    def collect(
        self, starts: Sequence[EpisodeSpec], params: SamplingParams
    ) -> tuple[list[Trajectory], Parts]:
        """Episodes from these starts, those that have a reward, with it; and every part of it."""
        with self.stage.phase("generate"), self.engine.generating():
            for optimizer in self.optimizers:
                optimizer.rest()
            before = self.collector.failures, self.collector.overlong
            rewarded: Rewarded = "finite" if self.score.environment_weight else "any"
            trajectories = self.collector.collect(starts, params, self.score.begin, rewarded)
            failures = self.collector.failures - before[0]
            overlong = self.collector.overlong - before[1]
            why = self.collector.last_failure
            self.left_out.add("environment", failures - overlong, why)
            self.left_out.add("overlong_prompt", overlong, why)
        with self.stage.phase("reward"):
            return self.rewarded(trajectories)

    def greedy(self, step: int, groups: set[int]) -> dict[int, float]:
        """The return of the greedy completion of these groups' prompts."""
        params = replace(self.config.sampling(), n=1, temperature=0.0)
        rounds = range(1 + self.config.dynamic_sampling)
        starts = [s for n in rounds for s in self.starts(step, n) if s.group_id in groups]
        trajectories, _ = self.collect(starts, params)
        if not trajectories:
            return {}
        rewards_NA, _ = self.shaped(trajectories)
        played = [t.group_id for t in trajectories]
        return dict(zip(played, rewards_NA.sum(1).tolist(), strict=True))

    def starts(self, step: int, nth: int = 0) -> list[EpisodeSpec]:
        """The prompts of a step's `nth` rollout: rows in an order shuffled anew each epoch, a
        function of (seed, step).
        """
        P, seed = self.config.prompts, self.stage.seed
        first = (step * (1 + self.config.dynamic_sampling) + nth) * P
        groups = range(first, first + P)
        if self.rows is None:
            return [EpisodeSpec(g, named_seed(seed, f"episode/{g}") % 2**31) for g in groups]
        count = len(self.rows)
        orders = {
            epoch: torch.randperm(count, generator=generator(seed, f"prompts/{epoch}"))
            for epoch in {g // count for g in groups}
        }
        return [
            EpisodeSpec(
                g,
                named_seed(seed, f"episode/{g}") % 2**31,
                self.rows[int(orders[g // count][g % count])],
            )
            for g in groups
        ]

    def rewarded(self, trajectories: list[Trajectory]) -> tuple[list[Trajectory], Parts]:
        """The trajectories that have a reward, with it, and every part of it by name."""
        totals, parts = self.score(trajectories)
        kept = [i for i, total in enumerate(totals) if total is not None]
        self.left_out.add("no_reward", len(totals) - len(kept), self.score.last_failure)
        parts = {name: [values[i] for i in kept] for name, values in parts.items()}
        return [t for t in totals if t is not None], parts

    def shaped(self, trajectories: list[Trajectory]) -> tuple[Tensor, Tensor]:
        """[N, A] rewards at the tokens that earn them, clipped and with what length costs; and the
        mask of the tokens that the policy wrote.
        """
        config = self.config
        counts_N = torch.tensor([sum(t.loss_mask) for t in trajectories])
        mask_NA = row_mask(counts_N)
        rewards_NA = place_rewards(trajectories, mask_NA)
        if config.reward_clip is not None:
            rewards_NA = clip_rewards(rewards_NA, config.reward_clip)
        last_N = (torch.arange(len(trajectories)), counts_N - 1)
        if config.missing_end_penalty:
            cut_N = torch.tensor([t.finish_reason == "length" for t in trajectories])
            rewards_NA[last_N] -= config.missing_end_penalty * cut_N
        if buffer := round(config.overlong_buffer * config.max_new_tokens):
            rows_K, ends_K, lengths_K = turn_ends(trajectories)
            penalty_K = overlong_penalty(lengths_K, config.max_new_tokens, buffer)
            rewards_NA[rows_K, ends_K] += penalty_K
        return rewards_NA.to(self.engine.device), mask_NA.to(self.engine.device)

    def with_advantages(
        self,
        batch: PackedBatch,
        trajectories: list[Trajectory],
        greedy: dict[int, float] | None = None,
    ) -> tuple[PackedBatch, dict[str, float]]:
        """Give the batch its advantages, and what the loss will compare with (reference, old
        log-probs, values, returns). `greedy`: the return of each group's greedy completion.
        """
        config, device = self.config, batch.input_ids.device
        kl_in_reward = config.kl.beta > 0 and config.kl.where == "reward"
        values_M: Tensor | None = None
        if self.has_values or kl_in_reward or config.epochs * config.minibatches > 1:
            old = self.scores(batch)
            batch = batch.with_scored(old_logprobs=old.logprobs)
            values_M = old.values
            if values_M is not None:
                batch = batch.with_scored(old_values=values_M)
        if config.kl.beta > 0:
            batch = batch.with_scored(ref_logprobs=self.reference_logprobs(batch))
        rewards_NA, mask_NA = self.shaped(trajectories)
        counts_N = mask_NA.sum(1)
        if kl_in_reward:
            kl_M = KL_ESTIMATORS[config.kl.estimator](
                batch.scored("old_logprobs"), batch.scored("ref_logprobs")
            )
            kl_NA = pad_rows(kl_M, counts_N)
            rewards_NA = token_rewards(rewards_NA, kl_NA, self.memory.beta, mask_NA)
        greedy_N = None if greedy is None else [greedy[t.group_id] for t in trajectories]
        group_N = torch.tensor([t.group_id for t in trajectories], device=device)
        rollout = Rollout(
            rewards_NA,
            mask_NA,
            group_N,
            values_NA=None if values_M is None else pad_rows(values_M, counts_N),
            baseline=self.memory.baseline,
            given_NA=given_rewards(trajectories, mask_NA),
            greedy_N=None if greedy_N is None else torch.tensor(greedy_N, device=device),
            gamma=config.gamma,
            lam=config.lam,
        )
        advantages_NA, returns_NA = ADVANTAGES[config.advantage](rollout)
        mean_return = float(rewards_NA.sum(1).mean())
        self.memory.baseline = moving_average(
            self.memory.baseline, mean_return, config.baseline_decay
        )
        metrics = {"advantages/std": float(unpad_rows(advantages_NA, mask_NA).std(correction=0))}
        if values_M is not None:
            error_M = unpad_rows(returns_NA, mask_NA) - values_M
            spread = unpad_rows(returns_NA, mask_NA).var(correction=0).clamp(min=1e-8)
            metrics["value/explained_variance"] = 1.0 - float(error_M.var(correction=0) / spread)
        counts_NA = mask_NA  # in the loss, and so in what advantages are whitened by
        if config.truncated == "mask":
            whole = [t.finish_reason != "length" for t in trajectories]
            counts_NA = mask_NA & torch.tensor(whole, device=device)[:, None]
        if config.whiten == "batch":
            advantages_NA = whiten(advantages_NA, counts_NA)
        elif config.whiten == "group":
            advantages_NA = whiten_groups(advantages_NA, counts_NA, group_N)
        if config.positive_only:
            advantages_NA = advantages_NA.clamp(min=0.0)
        batch = batch.with_scored(
            advantages=unpad_rows(advantages_NA, mask_NA), returns=unpad_rows(returns_NA, mask_NA)
        )
        return batch.with_unscored(~unpad_rows(counts_NA, mask_NA)), metrics

    def update(self, batch: PackedBatch, step: int) -> dict[str, float]:
        """All updates of one rollout; metrics are means over them."""
        config = self.config
        warming = self.has_values and step < config.critic_warmup
        learning = self.optimizers[1:] if warming else self.optimizers
        history: list[dict[str, float]] = []
        for epoch in range(config.epochs):
            for mini in minibatches(
                batch, config.minibatches, generator(self.stage.seed, f"mini/{step}/{epoch}")
            ):
                if not bool(mini.loss_mask.any()):  # all were cut, and cut ones are masked
                    continue
                nth = step * config.epochs * config.minibatches + len(history)
                counts = mini.counts[mini.counts > 0]
                weights = loss_weights(counts, config.aggregation, config.max_new_tokens)
                mini = mini.with_scored(loss_weights=weights.to(batch.input_ids.device))
                if self.only_advantages_count:
                    assert mini.advantages is not None
                    mini = mini.keep(mini.advantages != 0)
                with self.engine.training():
                    micros = [*mini.split(config.micro_batch_tokens), *self.supervised(nth)]
                    computed = float(mini.scored("loss_weights").sum())
                    loss_of = partial(self.loss_of, computed=computed)
                    history.append(update(micros, loss_of, *learning))
                if warming:
                    self.engine.model.zero_grad()
                self.engine.weights_changed()
                if self.average:
                    self.average.update()
        return {name: fmean(h[name] for h in history) for name in (history[:1] or [{}])[0]}

    def adapt(self, metrics: dict[str, float], completions: int) -> dict[str, float]:
        """Bring beta nearer to what keeps the KL at its target."""
        kl = self.config.kl
        if kl.target is None or "kl" not in metrics:
            return {}
        used = self.memory.beta
        nats = metrics["kl"] * metrics["completions/mean_length"]
        self.memory.beta = adaptive_beta(used, nats, kl.target, kl.horizon, completions)
        return {"kl/beta": used}

    def supervised(self, nth: int) -> list[PackedBatch]:
        """The labelled examples that stand beside the `nth` update, in micro-batches."""
        if self.examples is None:
            return []
        rows = self.examples.batch(nth, self.config.supervised.batch_size)
        return list(
            supervised_batch(rows).to(self.engine.device).split(self.config.micro_batch_tokens)
        )

    @property
    def has_values(self) -> bool:
        """Whether there is a value net."""
        return self.head is not None or self.critic is not None

    @property
    def only_advantages_count(self) -> bool:
        """Whether a completion whose advantage is 0 has no gradient and need not be computed.

        Its weight in the mean stays: the gradient is the same, sooner.
        """
        kl = self.config.kl
        return not self.has_values and (kl.beta == 0 or kl.where == "reward")

    def loss_of(self, batch: PackedBatch, computed: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Policy loss + beta * KL (where it is in the loss) + coefficient * value loss, of one
        micro-batch; or the weighted loss of one of labelled examples.

        Metrics are means over what is computed, which has `computed` of the loss's weights.
        """
        config = self.config
        if batch.advantages is None:
            loss, _ = supervised_loss(self.engine, batch)
            return config.supervised.weight * loss, {"supervised/loss": loss}
        weights_M = batch.scored("loss_weights")
        counts_N = batch.counts[batch.counts > 0].to(weights_M.device)
        scores = self.engine.logprobs(batch, config.temperature, self.head)
        old_M = (
            scores.logprobs.detach() if batch.old_logprobs is None else batch.scored("old_logprobs")
        )
        policy = POLICY_LOSSES[config.loss](
            scores.logprobs, old_M, batch.scored("advantages"), counts_N, config.limits()
        )
        sampler_M = batch.scored("sampler_logprobs")
        figures = {
            **policy.metrics,
            "entropy": scores.entropy,
            "sampling/logprob_gap": (old_M - sampler_M).abs(),
            "sampling/kl": mismatch(old_M, sampler_M)["kl"],
        }
        loss_M = policy.loss_M
        if config.importance != "none":
            importance_M = importance_weights(
                old_M, sampler_M, counts_N, config.importance, config.importance_cap
            )
            loss_M, figures["sampling/importance"] = loss_M * importance_M, importance_M
        if config.kl.beta > 0:
            ref_M = batch.scored("ref_logprobs")
            figures["kl"] = KL_ESTIMATORS["k3"](scores.logprobs, ref_M)
            if config.kl.where == "loss":
                kl_M = KL_ESTIMATORS[config.kl.estimator](scores.logprobs, ref_M)
                if config.kl.ratio:
                    kl_M = with_ratio(kl_M, scores.logprobs, old_M)
                loss_M = loss_M + self.memory.beta * kl_M
        values_M = self.critic(batch) if self.critic else scores.values
        if values_M is not None:
            error_M = value_loss(
                values_M, batch.scored("returns"), batch.scored("old_values"), config.value_clip
            )
            loss_M = loss_M + config.value_coefficient * error_M
            figures["value/loss"] = error_M
        share_M = weights_M / computed
        return (weights_M * loss_M).sum(), {k: (share_M * v).sum() for k, v in figures.items()}

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> TokenScores:
        """[M] log-probs, entropy and values of the policy before this rollout's updates."""
        parts = []
        for micro in batch.split(self.config.micro_batch_tokens):
            with self.engine.training(), torch.no_grad():
                part = self.engine.logprobs(micro, self.config.temperature, self.head)
                if self.critic:
                    part = part._replace(values=self.critic(micro))
            parts.append(part)
        joined = [torch.cat(column) for column in zip(*parts, strict=True) if column[0] is not None]
        return TokenScores(*joined)

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """[M] log-probs under the reference policy: a model of its own, or the policy's with its
        adapters off.
        """
        if self.reference is None:
            raise ValueError("kl.beta > 0 needs a reference model.")
        with adapters_off(self.reference.model):
            return torch.cat([
                self.reference.logprobs(micro, self.config.temperature).logprobs
                for micro in batch.split(self.config.micro_batch_tokens)
            ])  # fmt: skip
