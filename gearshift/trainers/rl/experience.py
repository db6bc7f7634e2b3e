"""From episodes with rewards to a batch to learn from: log-probs before the update, values, KL and
advantages. This file must not import the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gearshift.algorithms.advantages import ADVANTAGES, Advantages, Rollout
from gearshift.algorithms.kl import KL_ESTIMATORS
from gearshift.algorithms.normalize import whiten
from gearshift.algorithms.shaping import clip_rewards, overlong_penalty, token_rewards
from gearshift.batch import PackedBatch
from gearshift.engine import Engine
from gearshift.models.adapters import adapters_off
from gearshift.models.heads import ValueHead
from gearshift.models.logprobs import TokenScores
from gearshift.models.runner import ModelRunner
from gearshift.runtime.micro_batch import MicroBatchSize
from gearshift.trainers.rl.batching import given_rewards, place_rewards, turns, written_lengths
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.critic import Critic
from gearshift.types import Trajectory


@dataclass
class AdaptiveState:
    """State that adapts from rollout to rollout."""

    beta: float
    """Weight of the KL."""
    baseline: float | None = None
    """Moving average of the returns."""

    def state_dict(self) -> dict[str, float | None]:
        """The state for a checkpoint."""
        return {"beta": self.beta, "baseline": self.baseline}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.beta, self.baseline = state["beta"], state["baseline"]


@dataclass
class Models:
    """The policy, its value net and the reference."""

    engine: Engine
    reference: ModelRunner | None = None
    head: ValueHead | None = None
    """The head that reads values from the policy's states. Without it, values come from `critic`,
    or there are none.
    """
    critic: Critic | None = None

    @property
    def trained(self) -> list[ModelRunner]:
        """The runners of the models that learn, the policy's first."""
        return [self.engine.runner, *([self.critic.runner] if self.critic else [])]

    def scores(self, batch: PackedBatch, temperature: float) -> TokenScores:
        """[M] log-probs, entropy and values under the policy and the value net, in the training
        gear.
        """
        scores = self.engine.logprobs(batch, temperature, self.head)
        return scores._replace(values=self.critic(batch)) if self.critic else scores


@dataclass
class ExperienceMaker:
    """Adds to a packed rollout its advantages and the log-probs and values that the loss needs."""

    config: RLConfig
    models: Models
    state: AdaptiveState
    micro_batch: MicroBatchSize

    def __call__(
        self,
        batch: PackedBatch,
        trajectories: Sequence[Trajectory],
        greedy: dict[int, float] | None = None,
    ) -> tuple[PackedBatch, dict[str, float]]:
        """The batch with its advantages and with what the loss compares with (reference, old
        log-probs, values, returns); and metrics. `greedy`: the return of each group's greedy
        completion.
        """
        batch = self.scored(batch)
        out, metrics = self.advantages(batch, trajectories, greedy)
        device = batch.input_ids.device
        lengths_N = written_lengths(trajectories).to(device)
        whole_N = torch.ones(len(trajectories), dtype=torch.bool, device=device)
        if self.config.shaping.mask_truncated_completions:
            whole = [t.finish_reason != "length" for t in trajectories]
            whole_N = torch.tensor(whole, device=device)
        counted_M = torch.repeat_interleave(whole_N, lengths_N)
        advantages_M, method = out.advantages_M, self.config.advantage
        if method.whiten != "none":
            group_N = _groups(trajectories, device) if method.whiten == "group" else None
            advantages_M = whiten(advantages_M, counted_M, lengths_N, group_N)
        if method.positive_only:
            advantages_M = advantages_M.clamp(min=0.0)
        batch = batch.with_scored(advantages=advantages_M)
        if out.returns_M is not None:
            batch = batch.with_scored(returns=out.returns_M)
        return batch.with_unscored(~counted_M), metrics

    def scored(self, batch: PackedBatch) -> PackedBatch:
        """The batch with the log-probs and values before the update, where the advantage or the
        loss reads them, and with the reference's log-probs.
        """
        config = self.config
        unknown = bool(batch.scored("sampler_logprobs").isnan().any())
        if config.value or config.kl_in_reward or config.updates_a_step > 1 or unknown:
            old = self.old_scores(batch)
            if unknown:  # the sampler knows only those of its truncated distribution
                batch = batch.with_scored(sampler_logprobs=old.logprobs)
            batch = batch.with_scored(old_logprobs=old.logprobs)
            if old.values is not None:
                batch = batch.with_scored(old_values=old.values)
        if config.kl.beta > 0:
            batch = batch.with_scored(ref_logprobs=self.reference_logprobs(batch))
        return batch

    def advantages(
        self,
        batch: PackedBatch,
        trajectories: Sequence[Trajectory],
        greedy: dict[int, float] | None,
    ) -> tuple[Advantages, dict[str, float]]:
        """The advantages of a scored batch before whitening, and metrics."""
        config, device = self.config, batch.input_ids.device
        rewards_M = shaped_rewards(trajectories, config).to(device)
        if config.kl_in_reward:
            kl_M = KL_ESTIMATORS[config.kl.estimator](
                batch.scored("old_logprobs"), batch.scored("ref_logprobs")
            )
            rewards_M = token_rewards(rewards_M, kl_M, self.state.beta)
        greedy_N = None
        if greedy is not None:
            greedy_N = torch.tensor([greedy[t.group_id] for t in trajectories], device=device)
        rollout = Rollout(
            rewards_M,
            written_lengths(trajectories).to(device),
            _groups(trajectories, device),
            values_M=batch.scored("old_values") if config.value else None,
            baseline=self.state.baseline,
            greedy_N=greedy_N,
            given_M=given_rewards(trajectories).to(device),
        )
        method = config.advantage
        out = ADVANTAGES[method.name](rollout, **method.parameters())
        self.state.baseline = out.baseline
        metrics = {"advantages/std": float(out.advantages_M.std(correction=0))}
        if rollout.values_M is not None and out.returns_M is not None:
            error_M = out.returns_M - rollout.values_M
            spread = out.returns_M.var(correction=0).clamp(min=1e-8)
            metrics["value/explained_variance"] = 1.0 - float(error_M.var(correction=0) / spread)
        return out, metrics

    @torch.no_grad()
    def old_scores(self, batch: PackedBatch) -> TokenScores:
        """[M] log-probs, entropy and values before this rollout's updates."""
        temperature = self.config.rollout.temperature

        def work(micros: Sequence[PackedBatch]) -> list[TokenScores]:
            with self.models.engine.training(), torch.no_grad():
                return [self.models.scores(micro, temperature) for micro in micros]

        parts = self.micro_batch.run(batch.split_groups, work)
        device = batch.input_ids.device
        columns = [column for column in zip(*parts, strict=True) if column[0] is not None]
        return TokenScores(*(torch.cat([x.to(device) for x in column]) for column in columns))

    @torch.no_grad()
    def reference_logprobs(self, batch: PackedBatch) -> Tensor:
        """[M] log-probs under the reference policy: a separate model, or the policy with its
        adapters off.
        """
        reference, temperature = self.models.reference, self.config.rollout.temperature
        if reference is None:
            raise ValueError("kl.beta > 0 needs a reference model.")

        def work(micros: Sequence[PackedBatch]) -> list[Tensor]:
            with adapters_off(reference.model), torch.no_grad():
                return [reference.logprobs(micro, temperature).logprobs for micro in micros]

        parts = self.micro_batch.run(batch.split_groups, work)
        return torch.cat([part.to(batch.input_ids.device) for part in parts])


def shaped_rewards(trajectories: Sequence[Trajectory], config: RLConfig) -> Tensor:
    """[M] rewards at the tokens that earn them, clipped and with the penalties on length."""
    shaping, longest = config.shaping, config.rollout.max_new_tokens
    rewards_M = place_rewards(trajectories)
    if shaping.clip is not None:
        rewards_M = clip_rewards(rewards_M, shaping.clip)
    if shaping.missing_eos_penalty:
        cut_N = torch.tensor([t.finish_reason == "length" for t in trajectories])
        last_N = written_lengths(trajectories).cumsum(0) - 1
        rewards_M[last_N] -= shaping.missing_eos_penalty * cut_N
    if buffer := round(shaping.overlong_buffer * longest):
        ends_K, lengths_K = turns(trajectories)
        rewards_M[ends_K] += overlong_penalty(lengths_K, longest, buffer)
    return rewards_M


def _groups(trajectories: Sequence[Trajectory], device: torch.device) -> Tensor:
    """[N]: the group of each trajectory."""
    return torch.tensor([t.group_id for t in trajectories], device=device)
