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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, pstdev
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from gearshift.algorithms.advantages import ADVANTAGES, NEEDS_VALUES, token_rewards
from gearshift.algorithms.kl import KL_ESTIMATORS
from gearshift.algorithms.normalize import loss_weights, pad_rows, row_mask, unpad_rows, whiten
from gearshift.algorithms.policy_losses import POLICY_LOSSES, value_loss
from gearshift.data import DataConfig, Mixture
from gearshift.data.packing import pack_groups
from gearshift.engine import HybridEngine, PackedModel
from gearshift.errors import DataError
from gearshift.models.adapters import adapters_off
from gearshift.models.forward import token_scores
from gearshift.models.heads import ValueHead
from gearshift.models.logprobs import TokenScores
from gearshift.rollouts.collector import Collector, Start
from gearshift.runtime.config import Config
from gearshift.runtime.optimizer import MasterAdamW, OptimizerConfig
from gearshift.runtime.seeding import generator, named_seed
from gearshift.trainers.sft import Rendered, supervised_batch, supervised_loss
from gearshift.trainers.stage import Stage, StageConfig
from gearshift.trainers.step import update
from gearshift.types import PackedBatch, SamplingParams, Trajectory

Advantage = Literal["reinforce", "gae", "rloo", "grpo", "dr_grpo"]
PolicyLossName = Literal["reinforce", "ppo_clip"]
Aggregation = Literal["token_mean", "sequence_mean"]


class KLConfig(Config):
    """Keeping the policy near the reference."""

    beta: float = Field(0.02, ge=0)
    """Weight of the KL; at 0 no reference model is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """How the KL is estimated from sampled tokens; in the loss use k2 or k3, for k1 has no gradient
    there.
    """
    where: Literal["reward", "loss"] = "reward"
    """Subtract it from each token's reward, or add it to the loss."""


class RewardSource(Config):
    """One part of the reward."""

    source: str = "environment"
    """`environment`; `model` (this run's reward model); `model:FOLDER`; `package.module:function`;
    `file.py:function`.
    """
    weight: float = 1.0
    """Its weight in the sum; 0 only logs it."""


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
    group_size: int = Field(8, ge=1)
    """Completions of each prompt."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and so of the policy that is trained."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 the sampler is not the policy that is trained; ratios stay about the untruncated
    policy.
    """
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer of one turn."""
    rewards: tuple[RewardSource, ...] = (RewardSource(),)
    """What is rewarded; the environment's own reward is logged in any case."""
    advantage: Advantage = "reinforce"
    """How rewards become weights of tokens."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount from token to token."""
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalised advantage estimation."""
    positive_only: bool = False
    """Learn from what beat its baseline and leave the rest, as rejection sampling does (RAFT, Dong
    et al. 2023). Not the policy gradient, but less noise where samples are few."""
    whiten: bool = False
    """Bring the rollout's advantages to mean 0 and variance 1."""
    value: Literal["head", "critic"] = "head"
    """The value net, where the advantage needs one: a head on the policy, or a separate model."""
    value_coefficient: float = Field(0.5, ge=0)
    """Weight of the value loss."""
    value_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    """Of the value head, or of the critic (where 1e-5 is a better rate)."""
    loss: PolicyLossName = "reinforce"
    """The policy loss."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """`ppo_clip`: the ratio stays above 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0)
    """`ppo_clip`: the ratio stays below 1 + clip_high."""
    aggregation: Aggregation = "token_mean"
    """Whether each token or each completion counts the same."""
    epochs: int = Field(1, ge=1)
    """Passes over one rollout."""
    minibatches: int = Field(1, ge=1)
    """Updates in one pass."""
    kl: KLConfig = KLConfig()
    """Penalty on the distance to the reference policy."""
    supervised: SupervisedMix = SupervisedMix()
    """Labelled examples mixed into each update."""
    max_tokens: int = Field(4096, ge=1)
    """Tokens in one micro-batch; bounds memory, does not change the gradient."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, warmup=5)
    """Of the policy."""

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


Parts = dict[str, list[float | None]]
Scorer = Callable[[Sequence[Trajectory]], tuple[list[Trajectory | None], Parts]]
"""Trajectories -> each with its rewards as they count (None: it has none), and every part of them
by name.
"""


@dataclass
class ValueNet:
    """The baseline: a head, on the policy's trunk or on a critic's own."""

    head: ValueHead
    critic: PreTrainedModel | None = None

    def __post_init__(self) -> None:
        self._states = PackedModel(self.critic) if self.critic else None

    def of_critic(self, batch: PackedBatch) -> Tensor:
        """[M] values by the critic."""
        assert self._states is not None
        values: Tensor = self.head(self._states(batch)[batch.predictors])
        return values

    def parameters(self) -> list[nn.Parameter]:
        """Of head and critic."""
        return [*self.head.parameters(), *(self.critic.parameters() if self.critic else ())]


class RLTrainer:
    """Holds what lives across steps; `train` is the loop."""

    def __init__(
        self,
        config: RLConfig,
        engine: HybridEngine,
        collector: Collector,
        rows: int | None,
        score: Scorer,
        stage: Stage,
        reference: PreTrainedModel | None = None,
        critic: PreTrainedModel | None = None,
        examples: Mixture[Rendered] | None = None,
    ) -> None:
        """`rows`: how many rows the environment draws from, or None where each episode is drawn by
        its seed. `reference` is needed where `kl.beta` > 0; `critic` (a causal LM) where `value` is
        `critic`; `examples` are mixed into the updates.
        """
        self.examples = examples
        self.config, self.engine, self.collector = config, engine, collector
        self.rows, self.score, self.stage, self.reference = rows, score, stage, reference
        self.reference_states = (
            engine.states if reference in (None, engine.model) else PackedModel(reference)
        )
        self.optimizers = [MasterAdamW(engine.model.parameters(), config.optimizer, config.updates)]
        stage.track(model=engine.model, optimizer=self.optimizers[0])
        self.value_net: ValueNet | None = None
        if config.advantage in NEEDS_VALUES:
            head = ValueHead(engine.model.config.hidden_size).to(engine.device)
            self.value_net = ValueNet(head, critic if config.value == "critic" else None)
            optimizer = MasterAdamW(
                self.value_net.parameters(), config.value_optimizer, config.updates
            )
            self.optimizers.append(optimizer)
            stage.track(value_head=head, value_optimizer=optimizer)
            if self.value_net.critic is not None:
                stage.track(critic=self.value_net.critic)

    def train(self) -> None:
        """Sample prompts, collect, score, advantages, update; until the stage's last step."""
        for step in self.stage.steps(on_resume=self.engine.weights_changed):
            with self.stage.phase("generate"), self.engine.generating():
                trajectories = self.collector.collect(self.starts(step), self.config.sampling())
            with self.stage.phase("reward"):
                trajectories, parts = self.rewarded(trajectories)
            batch = pack_trajectories(trajectories, self.config.max_tokens).to(self.engine.device)
            with self.stage.phase("score"):
                batch, scored = self.with_advantages(batch, trajectories)
            with self.stage.phase("train"):
                updated = self.update(batch, step)
            metrics = describe_rollout(trajectories, parts)
            metrics |= scored | updated | {"environment/failures": float(self.collector.failures)}
            metrics |= describe_generation(self.engine)
            self.stage.rollouts.append(step, {"episodes": [record(t) for t in trajectories]})
            self.stage.log(step, metrics, tokens=len(batch))

    def starts(self, step: int) -> list[Start]:
        """The rollout's prompts: rows in an order shuffled anew each epoch, a function of (seed,
        step).
        """
        P, seed = self.config.prompts, self.stage.seed
        groups = range(step * P, (step + 1) * P)
        if self.rows is None:
            return [Start(g, named_seed(seed, f"episode/{g}") % 2**31) for g in groups]
        orders = {
            epoch: torch.randperm(self.rows, generator=generator(seed, f"prompts/{epoch}"))
            for epoch in {g // self.rows for g in groups}
        }
        return [
            Start(
                g,
                named_seed(seed, f"episode/{g}") % 2**31,
                int(orders[g // self.rows][g % self.rows]),
            )
            for g in groups
        ]

    def rewarded(self, trajectories: list[Trajectory]) -> tuple[list[Trajectory], Parts]:
        """The trajectories that have a reward, with it, and every part of it by name."""
        totals, parts = self.score(trajectories)
        kept = [i for i, total in enumerate(totals) if total is not None]
        if not kept:
            why = self.collector.last_failure or "every reward was None or not finite"
            raise DataError(
                f"No episode of this rollout has a reward ({why}); "
                "look at the environment and the rewards."
            )
        parts = {name: [values[i] for i in kept] for name, values in parts.items()}
        return [t for t in totals if t is not None], parts

    def with_advantages(
        self, batch: PackedBatch, trajectories: list[Trajectory]
    ) -> tuple[PackedBatch, dict[str, float]]:
        """Give the batch its advantages, and what the loss will compare with (reference, old
        log-probs, returns).
        """
        config, device = self.config, batch.input_ids.device
        kl_in_reward = config.kl.beta > 0 and config.kl.where == "reward"
        values_M: Tensor | None = None
        if self.value_net or kl_in_reward or config.epochs * config.minibatches > 1:
            old = self.scores(batch)
            values_M = old.values
            batch = batch.with_scored(old_logprobs=old.logprobs)
        if config.kl.beta > 0:
            batch = batch.with_scored(ref_logprobs=self.reference_logprobs(batch))
        counts_N = torch.tensor([sum(t.loss_mask) for t in trajectories], device=device)
        mask_NA = row_mask(counts_N)
        rewards_NA = place_rewards(trajectories, mask_NA)
        if kl_in_reward:
            kl_M = KL_ESTIMATORS[config.kl.estimator](
                batch.scored("old_logprobs"), batch.scored("ref_logprobs")
            )
            rewards_NA = token_rewards(
                rewards_NA, pad_rows(kl_M, counts_N), config.kl.beta, mask_NA
            )
        advantages_NA, returns_NA = ADVANTAGES[config.advantage](
            rewards_NA,
            mask_NA,
            values_NA=None if values_M is None else pad_rows(values_M, counts_N),
            group_N=torch.tensor([t.group_id for t in trajectories], device=device),
            gamma=config.gamma,
            lam=config.lam,
        )
        metrics = {"advantages/std": float(unpad_rows(advantages_NA, mask_NA).std(correction=0))}
        if values_M is not None:
            error_M = unpad_rows(returns_NA, mask_NA) - values_M
            metrics["value/explained_variance"] = 1.0 - float(
                error_M.var() / unpad_rows(returns_NA, mask_NA).var().clamp(min=1e-8)
            )
        if config.whiten:
            advantages_NA = whiten(advantages_NA, mask_NA)
        if config.positive_only:
            advantages_NA = advantages_NA.clamp(min=0.0)
        batch = batch.with_scored(
            advantages=unpad_rows(advantages_NA, mask_NA), returns=unpad_rows(returns_NA, mask_NA)
        )
        return batch, metrics

    def update(self, batch: PackedBatch, step: int) -> dict[str, float]:
        """All updates of one rollout; metrics are means over them."""
        config = self.config
        history: list[dict[str, float]] = []
        for epoch in range(config.epochs):
            for mini in minibatches(
                batch, config.minibatches, generator(self.stage.seed, f"mini/{step}/{epoch}")
            ):
                nth = step * config.epochs * config.minibatches + len(history)
                counts = mini.counts[mini.counts > 0]
                weights = loss_weights(counts, config.aggregation).to(batch.input_ids.device)
                mini = mini.with_scored(loss_weights=weights)
                if self.only_advantages_count:
                    assert mini.advantages is not None
                    mini = mini.keep(mini.advantages != 0)
                with self.engine.training():
                    micros = [*mini.split(config.max_tokens), *self.supervised(nth)]
                    computed = float(mini.scored("loss_weights").sum())
                    loss_of = partial(self.loss_of, computed=computed)
                    history.append(update(micros, loss_of, *self.optimizers))
                self.engine.weights_changed()
        return {name: fmean(h[name] for h in history) for name in history[0]}

    def supervised(self, nth: int) -> list[PackedBatch]:
        """The labelled examples that stand beside the `nth` update, in micro-batches."""
        if self.examples is None:
            return []
        rows = self.examples.batch(nth, self.config.supervised.batch_size)
        return list(supervised_batch(rows).to(self.engine.device).split(self.config.max_tokens))

    @property
    def only_advantages_count(self) -> bool:
        """Whether a completion whose advantage is 0 has no gradient and need not be computed.

        Its weight in the mean stays: the gradient is the same, sooner.
        """
        kl = self.config.kl
        return self.value_net is None and (kl.beta == 0 or kl.where == "reward")

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
        scores = self.engine.logprobs(batch, config.temperature, self._shared_head)
        old_M = (
            scores.logprobs.detach() if batch.old_logprobs is None else batch.scored("old_logprobs")
        )
        policy = POLICY_LOSSES[config.loss](
            scores.logprobs, old_M, batch.scored("advantages"),
            clip_low=config.clip_low, clip_high=config.clip_high,
        )  # fmt: skip
        loss = (weights_M * policy.loss_M).sum()
        share_M = weights_M / computed
        metrics = {name: (share_M * value_M).sum() for name, value_M in policy.metrics.items()}
        metrics["entropy"] = (share_M * scores.entropy).sum()
        gap_M = (old_M - batch.scored("sampler_logprobs")).abs()
        metrics["sampling/logprob_gap"] = (share_M * gap_M).sum()
        if config.kl.beta > 0:
            ref_M = batch.scored("ref_logprobs")
            metrics["kl"] = (share_M * KL_ESTIMATORS["k3"](scores.logprobs, ref_M)).sum()
            if config.kl.where == "loss":
                kl_M = KL_ESTIMATORS[config.kl.estimator](scores.logprobs, ref_M)
                loss = loss + config.kl.beta * (weights_M * kl_M).sum()
        values_M = scores.values
        if self.value_net and self.value_net.critic is not None:
            values_M = self.value_net.of_critic(batch)
        if values_M is not None:
            error = (weights_M * value_loss(values_M, batch.scored("returns"))).sum()
            loss = loss + config.value_coefficient * error
            metrics["value/loss"] = error / computed
        return loss, metrics

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> TokenScores:
        """[M] log-probs, entropy and values of the policy before this rollout's updates."""
        parts = []
        for micro in batch.split(self.config.max_tokens):
            with self.engine.training(), torch.no_grad():
                part = self.engine.logprobs(micro, self.config.temperature, self._shared_head)
                if self.value_net and self.value_net.critic is not None:
                    part = part._replace(values=self.value_net.of_critic(micro))
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
        with adapters_off(self.reference):
            return torch.cat([
                token_scores(
                    self.reference, micro, self.config.temperature, states=self.reference_states
                ).logprobs
                for micro in batch.split(self.config.max_tokens)
            ])  # fmt: skip

    @property
    def _shared_head(self) -> ValueHead | None:
        return self.value_net.head if self.value_net and self.value_net.critic is None else None


def pack_trajectories(trajectories: Sequence[Trajectory], max_tokens: int) -> PackedBatch:
    """Groups with their prompt stored once, in the order of the trajectories, which come group by
    group.
    """
    groups: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, []).append(t)
    batch = pack_groups(
        [
            (
                members[0].token_ids[: members[0].prompt_length],
                [(t.token_ids[t.prompt_length :], t.loss_mask[t.prompt_length :]) for t in members],
            )
            for members in groups.values()
        ],
        max_tokens=max_tokens,
    )
    sampled = [
        logprob
        for t in trajectories
        for logprob, mask in zip(t.logprobs, t.loss_mask, strict=True)
        if mask
    ]
    return batch.with_scored(sampler_logprobs=torch.tensor(sampled))


def place_rewards(trajectories: Sequence[Trajectory], mask_NA: Tensor) -> Tensor:
    """[N, A] rewards at the tokens that the policy wrote."""
    rewards_NA = torch.zeros(mask_NA.shape, dtype=torch.float32, device=mask_NA.device)
    for row_A, t in zip(rewards_NA, trajectories, strict=True):
        written = [r for r, mask in zip(t.rewards, t.loss_mask, strict=True) if mask]
        row_A[: len(written)] = torch.tensor(written)
    return rewards_NA


def minibatches(batch: PackedBatch, count: int, order: torch.Generator) -> list[PackedBatch]:
    """The batch's trees dealt into `count` batches in a random order; the batch itself for one."""
    if count == 1:
        return [batch]
    trees = batch.trees()
    if count > len(trees):
        raise DataError(
            f"A rollout of {len(trees)} groups cannot be cut into minibatches={count}; lower it."
        )
    shuffled = [trees[i] for i in torch.randperm(len(trees), generator=order)]
    return [
        PackedBatch.join([batch.slice(*tree) for tree in shuffled[i::count]]) for i in range(count)
    ]


def describe_rollout(trajectories: Sequence[Trajectory], parts: Parts) -> dict[str, float]:
    """What was sampled, in TRL's names where it has one; `docs/metrics.md` defines each."""
    lengths = [sum(t.loss_mask) for t in trajectories]
    by_group: dict[int, list[float]] = {}
    for t in trajectories:
        by_group.setdefault(t.group_id, []).append(t.reward)
    metrics = {
        "reward": fmean(t.reward for t in trajectories),
        "reward_std": fmean(pstdev(group) for group in by_group.values()),
        "frac_reward_zero_std": fmean(pstdev(group) < 1e-8 for group in by_group.values()),
        "success": fmean(bool(t.info.get("success", False)) for t in trajectories),
        "completions/mean_length": fmean(lengths),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(t.finish_reason == "length" for t in trajectories),
    }
    for name, values in parts.items():
        known = [v for v in values if v is not None]
        if known:
            metrics[f"rewards/{name}/mean"] = fmean(known)
            metrics[f"rewards/{name}/std"] = pstdev(known)
    return metrics


def describe_generation(engine: HybridEngine) -> dict[str, float]:
    """Where the generation gear's time went in this step."""
    done, shift = engine.timing(), engine.shift_seconds
    engine.shift_seconds = 0.0
    return {
        "engine/shift_seconds": shift,
        "engine/prefill_seconds": done.prefill_seconds,
        "engine/decode_seconds": done.decode_seconds,
        "engine/decode_tokens_per_second": done.decode_tokens / max(done.decode_seconds, 1e-9),
        "engine/roofline_fraction": engine.roofline_fraction(done),
        "engine/shared_tokens": float(done.shared_tokens),
        "engine/preemptions": float(done.preemptions),
    }


def record(trajectory: Trajectory) -> dict[str, Any]:
    """What `rollouts.jsonl` keeps of an episode."""
    return {
        "group_id": trajectory.group_id,
        "messages": trajectory.info["messages"],
        "token_ids": trajectory.token_ids[trajectory.prompt_length :],
        "reward": trajectory.reward,
        "finish_reason": trajectory.finish_reason,
    }
