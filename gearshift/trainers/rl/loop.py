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
from typing import Any, Protocol

import torch
from torch import Tensor

from gearshift.algorithms.advantages import (
    ADVANTAGES,
    NEEDS_GREEDY,
    NEEDS_GROUPS,
    Rollout,
)
from gearshift.algorithms.kl import KL_ESTIMATORS, adaptive_beta, with_ratio
from gearshift.algorithms.normalize import (
    loss_weights,
    pad_rows,
    row_mask,
    unpad_rows,
    whiten,
    whiten_groups,
)
from gearshift.algorithms.policy_losses import (
    POLICY_LOSSES,
    importance_weights,
    mismatch,
    value_loss,
)
from gearshift.algorithms.shaping import clip_rewards, overlong_penalty, token_rewards
from gearshift.batch import PackedBatch
from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.models.adapters import adapters_off
from gearshift.models.heads import ValueHead
from gearshift.models.logprobs import TokenScores
from gearshift.models.runner import ModelRunner
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec, Rewarded
from gearshift.runtime.optimizer import MasterAdamW
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
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.critic import Critic
from gearshift.trainers.rl.methods import ValueNet
from gearshift.trainers.sft import Rendered, supervised_batch, supervised_loss
from gearshift.trainers.stage import Stage
from gearshift.trainers.update import update
from gearshift.types import SamplingParams, Trajectory


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
        updates = config.updates
        if config.value:  # the policy has no part in the value net's warm-up
            updates -= min(config.value.warmup, config.steps) * config.updates_a_step
        self.optimizers = [MasterAdamW(engine.model.parameters(), config.update.optimizer, updates)]
        stage.track(model=engine.model, optimizer=self.optimizers[0], memory=self.memory)
        stage.track(rewards=score, left_out=self.left_out)
        self.head: ValueHead | None = None
        self.critic: Critic | None = None
        if config.value:
            self._add_value_net(config.value, critic)
        ema = config.update.ema
        self.average = MovingAverage(engine.model, ema) if ema else None
        if self.average:
            stage.track(average=self.average)

    def _add_value_net(self, config: ValueNet, critic: Critic | None) -> None:
        if config.kind == "critic":
            if critic is None:
                raise ValueError("value.kind=critic needs a critic.")
            self.critic = critic
            self.stage.track(**critic.modules)
            parameters = critic.parameters()
        else:
            self.head = ValueHead(self.engine.head.linear.in_features).to(self.engine.device)
            self.stage.track(value_head=self.head)
            parameters = list(self.head.parameters())
        self.optimizers.append(MasterAdamW(parameters, config.optimizer, self.config.updates))
        self.stage.track(value_optimizer=self.optimizers[1])

    def train(self) -> None:
        """Sample prompts, collect, score, advantages, update; until the stage's last step."""
        for step in self.stage.steps(on_resume=self.engine.weights_changed):
            trajectories, metrics = self.rollout(step)
            tokens = 0
            if trajectories:
                tokens, learned = self.learn(step, trajectories)
                metrics |= learned
            self.left_out.rollout(self.config.rollout.prompts, tokens)
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
        if self.config.advantage.name in NEEDS_GREEDY:
            greedy = self.greedy(step, {t.group_id for t in trajectories})
            known = [t for t in trajectories if t.group_id in greedy]
            self.left_out.add("no_greedy", len(trajectories) - len(known))
            trajectories = known
        if not trajectories:
            return 0, {}
        tokens = self.config.update.micro_batch_tokens
        batch = pack_trajectories(trajectories, tokens).to(self.engine.device)
        with self.stage.phase("score"):
            batch, scored = self.with_advantages(batch, trajectories, greedy)
        with self.stage.phase("train"):
            return len(batch), scored | self.update(batch, step)

    def rollout(self, step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """Episodes with their rewards, to learn from, and what to log of all that were sampled.

        Under `replace_zero_std` groups that teach nothing are replaced, if that many rollouts find
        others.
        """
        kept: dict[int, list[Trajectory]] = {}
        everything: list[Trajectory] = []
        all_parts: Parts = {}
        missing: dict[str, list[float]] = {}
        rounds, prompts = 1 + self.config.rollout.replace_zero_std, self.config.rollout.prompts
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
            if len(kept) >= prompts:
                break
        enough = list(kept.values())[:prompts]
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
        if self.config.advantage.name not in NEEDS_GROUPS:
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
        rounds = range(1 + self.config.rollout.replace_zero_std)
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
        prompts, seed = self.config.rollout.prompts, self.stage.seed
        first = (step * (1 + self.config.rollout.replace_zero_std) + nth) * prompts
        groups = range(first, first + prompts)
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
        config, longest = self.config.shaping, self.config.rollout.max_new_tokens
        counts_N = torch.tensor([sum(t.loss_mask) for t in trajectories])
        mask_NA = row_mask(counts_N)
        rewards_NA = place_rewards(trajectories, mask_NA)
        if config.clip is not None:
            rewards_NA = clip_rewards(rewards_NA, config.clip)
        last_N = (torch.arange(len(trajectories)), counts_N - 1)
        if config.missing_eos_penalty:
            cut_N = torch.tensor([t.finish_reason == "length" for t in trajectories])
            rewards_NA[last_N] -= config.missing_eos_penalty * cut_N
        if buffer := round(config.overlong_buffer * longest):
            rows_K, ends_K, lengths_K = turn_ends(trajectories)
            penalty_K = overlong_penalty(lengths_K, longest, buffer)
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
        if self.has_values or kl_in_reward or config.updates_a_step > 1:
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
        )
        method = config.advantage
        advantages_NA, returns_NA, self.memory.baseline = ADVANTAGES[method.name](
            rollout, **method.parameters()
        )
        metrics = {"advantages/std": float(unpad_rows(advantages_NA, mask_NA).std(correction=0))}
        if values_M is not None and returns_NA is not None:
            error_M = unpad_rows(returns_NA, mask_NA) - values_M
            spread = unpad_rows(returns_NA, mask_NA).var(correction=0).clamp(min=1e-8)
            metrics["value/explained_variance"] = 1.0 - float(error_M.var(correction=0) / spread)
        counts_NA = mask_NA  # in the loss, and so in what advantages are whitened by
        if config.shaping.mask_truncated_completions:
            whole = [t.finish_reason != "length" for t in trajectories]
            counts_NA = mask_NA & torch.tensor(whole, device=device)[:, None]
        if method.whiten == "batch":
            advantages_NA = whiten(advantages_NA, counts_NA)
        elif method.whiten == "group":
            advantages_NA = whiten_groups(advantages_NA, counts_NA, group_N)
        if method.positive_only:
            advantages_NA = advantages_NA.clamp(min=0.0)
        batch = batch.with_scored(advantages=unpad_rows(advantages_NA, mask_NA))
        if returns_NA is not None:
            batch = batch.with_scored(returns=unpad_rows(returns_NA, mask_NA))
        return batch.with_unscored(~unpad_rows(counts_NA, mask_NA)), metrics

    def update(self, batch: PackedBatch, step: int) -> dict[str, float]:
        """All updates of one rollout; metrics are means over them."""
        config, aggregation = self.config.update, self.config.loss.aggregation
        longest = self.config.rollout.max_new_tokens
        warming = self.config.value is not None and step < self.config.value.warmup
        learning = self.optimizers[1:] if warming else self.optimizers
        history: list[dict[str, float]] = []
        for epoch in range(config.epochs):
            for mini in minibatches(
                batch, config.minibatches, generator(self.stage.seed, f"mini/{step}/{epoch}")
            ):
                if not bool(mini.loss_mask.any()):  # all were cut, and cut ones are masked
                    continue
                nth = step * self.config.updates_a_step + len(history)
                counts = mini.counts[mini.counts > 0]
                weights = loss_weights(counts, aggregation, longest)
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
        if self.examples is None or self.config.sft_mix is None:
            return []
        rows = self.examples.batch(nth, self.config.sft_mix.batch_size)
        batch = supervised_batch(rows).to(self.engine.device)
        return list(batch.split(self.config.update.micro_batch_tokens))

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
            assert config.sft_mix is not None
            loss, _ = supervised_loss(self.engine, batch)
            return config.sft_mix.weight * loss, {"sft_mix/loss": loss}
        weights_M = batch.scored("loss_weights")
        counts_N = batch.counts[batch.counts > 0].to(weights_M.device)
        scores = self.engine.logprobs(batch, config.rollout.temperature, self.head)
        old_M = (
            scores.logprobs.detach() if batch.old_logprobs is None else batch.scored("old_logprobs")
        )
        policy = POLICY_LOSSES[config.loss.name](
            scores.logprobs,
            old_M,
            batch.scored("advantages"),
            counts_N,
            **config.loss.parameters(),
        )
        sampler_M = batch.scored("sampler_logprobs")
        figures = {
            **policy.metrics,
            "entropy": scores.entropy,
            "sampling/logprob_gap": (old_M - sampler_M).abs(),
            "sampling/kl": mismatch(old_M, sampler_M)["kl"],
        }
        loss_M = policy.loss_M
        if config.importance:
            importance_M = importance_weights(
                old_M, sampler_M, counts_N, config.importance.mode, config.importance.cap
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
        if values_M is not None and config.value:
            error_M = value_loss(
                values_M, batch.scored("returns"), batch.scored("old_values"), config.value.clip
            )
            loss_M = loss_M + config.value.coefficient * error_M
            figures["value/loss"] = error_M
        share_M = weights_M / computed
        return (weights_M * loss_M).sum(), {k: (share_M * v).sum() for k, v in figures.items()}

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> TokenScores:
        """[M] log-probs, entropy and values of the policy before this rollout's updates."""
        parts = []
        for micro in batch.split(self.config.update.micro_batch_tokens):
            with self.engine.training(), torch.no_grad():
                part = self.engine.logprobs(micro, self.config.rollout.temperature, self.head)
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
        temperature = self.config.rollout.temperature
        with adapters_off(self.reference.model):
            return torch.cat([
                self.reference.logprobs(micro, temperature).logprobs
                for micro in batch.split(self.config.update.micro_batch_tokens)
            ])  # fmt: skip
