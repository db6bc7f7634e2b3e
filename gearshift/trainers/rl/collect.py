"""The episodes that a step learns from: prompts are sampled, episodes collected and rewarded. Lost
episodes are left out and counted. This file must not import the trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

import torch

from gearshift.algorithms.advantages import NEEDS_GROUPS
from gearshift.algorithms.normalize import totals
from gearshift.engine import Engine
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec, Rewarded
from gearshift.runtime.optimizer import MasterAdamW
from gearshift.runtime.seeding import generator, named_seed
from gearshift.trainers.left_out import LeftOut, Reason
from gearshift.trainers.rl.batching import (
    RewardParts,
    by_group,
    describe_rollout,
    has_zero_std,
    written_lengths,
)
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.experience import shaped_rewards
from gearshift.trainers.rl.records import RolloutRecord
from gearshift.trainers.stage import Stage
from gearshift.types import SamplingParams, Trajectory


class RewardModel(Protocol):
    """Gives trajectories their rewards, as `CompositeReward` does. Checkpoints hold its state."""

    missing: dict[str, float]
    """The share of the last call's episodes whose reward was lost, by the part's name."""
    environment_weight: float
    """Weight of the environment's own reward; 0 where it does not count."""
    last_failure: str
    """Why a reward was lost, where that is known."""

    def begin(self, group: list[Trajectory]) -> None:
        """Begin to score a group that has ended, while others still run."""

    def __call__(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[Trajectory | None], RewardParts]:
        """Each trajectory with its rewards (None: it has none), and each part of them."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> None: ...


@dataclass
class RolloutSampler:
    """Samples the episodes of a step, with their rewards."""

    config: RLConfig
    engine: Engine
    collector: Collector
    rows: Sequence[int] | None
    """The rows that the environment draws from; None: each episode is drawn by its seed."""
    score: RewardModel
    stage: Stage
    optimizers: list[MasterAdamW]
    """Their state leaves the device while the policy generates, if the config says so."""
    left_out: LeftOut
    record: RolloutRecord = field(default_factory=RolloutRecord)
    """The record of the newest rollout."""

    def rollout(self, step: int) -> tuple[list[Trajectory], dict[str, float]]:
        """Episodes with their rewards, to learn from; and metrics of all that were sampled.

        Under `replace_zero_std` further rollouts replace groups whose rewards are all equal.
        """
        updates = step * self.config.updates_a_step
        self.record = RolloutRecord(
            self.config.record_figures, updates - self.engine.weights_version
        )
        kept: dict[int, list[Trajectory]] = {}
        everything: list[Trajectory] = []
        all_parts: RewardParts = {}
        missing: dict[str, list[float]] = {}
        rounds, prompts = 1 + self.config.rollout.replace_zero_std, self.config.rollout.prompts
        for nth in range(rounds):
            last = min(step + self.config.rollout.ahead, self.stage.total - 1)
            later = [self.starts(ahead) for ahead in range(step + 1, last + 1)]
            starts = self.starts(step, nth)
            trajectories, parts = self.collect(starts, self.config.sampling(), self.record, later)
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
        self.record.add(everything, all_parts)
        enough = list(kept.values())[:prompts]
        if enough:
            self.record.keep(_flat(kept.values()), "zero_std")
            self.record.keep(_flat(enough), "surplus")
        chosen = self.comparable(enough or by_group(everything).values())
        self.record.keep(_flat(chosen), "alone")
        metrics = describe_rollout(everything, all_parts)
        metrics |= {f"rewards/{name}/missing": fmean(shares) for name, shares in missing.items()}
        if rounds > 1:
            metrics["sampling/rollouts"] = nth + 1.0
        if self.config.rollout.ahead and everything:
            oldest = min(v for t in everything for v in t.weights_versions if v >= 0)
            metrics["sampling/updates_behind"] = float(self.engine.weights_version - oldest)
        return _flat(chosen), metrics

    def comparable(self, groups: Iterable[list[Trajectory]]) -> list[list[Trajectory]]:
        """The groups without those that have only one episode left, if the advantage compares
        episodes: a single episode has no baseline.
        """
        if self.config.advantage.name not in NEEDS_GROUPS:
            return list(groups)
        several = [group for group in groups if len(group) > 1]
        self.left_out.add("alone", sum(len(group) == 1 for group in groups))
        return several

    def collect(
        self,
        starts: Sequence[EpisodeSpec],
        params: SamplingParams,
        record: RolloutRecord,
        later: Sequence[Sequence[EpisodeSpec]] = (),
    ) -> tuple[list[Trajectory], RewardParts]:
        """Episodes from these starts that have a reward, with the reward and every part of it. If
        none is left of those that were begun, the episodes of `later` begin now, one list after the
        other on the newest weights, and the next calls collect them. `record` gets the episodes
        that are left out.
        """
        rewarded: Rewarded = "finite" if self.score.environment_weight else "any"
        how = params, self.score.begin, rewarded
        with self.stage.phase("generate"):
            before = self.collector.failures, self.collector.overlong
            # Weights are pushed where no request runs: after what was begun has ended.
            begun = self.collector.has_begun(starts)
            with nullcontext() if begun else self.collector.generating():
                for optimizer in self.optimizers:
                    optimizer.offload_state()
                trajectories = self.collector.collect(starts, *how)
            if later and not self.collector.has_begun(later[0]):
                with self.collector.generating():
                    for those in later:
                        self.collector.begin(those, *how)
            failures = self.collector.failures - before[0]
            overlong = self.collector.overlong - before[1]
            why = self.collector.last_failure
            self.left_out.add("environment", failures - overlong, why)
            self.left_out.add("overlong_prompt", overlong, why)
            for group, too_long, reason in self.collector.lost:
                what: Reason = "overlong_prompt" if too_long else "environment"
                record.add_failed(group, what, reason)
        with self.stage.phase("reward"):
            return self.rewarded(trajectories, record)

    def greedy(self, step: int, groups: set[int]) -> dict[int, float]:
        """The return of the greedy completion of these groups' prompts."""
        params = replace(self.config.sampling(), n=1, temperature=0.0)
        rounds = range(1 + self.config.rollout.replace_zero_std)
        starts = [s for n in rounds for s in self.starts(step, n) if s.group_id in groups]
        trajectories, _ = self.collect(starts, params, RolloutRecord())
        if not trajectories:
            return {}
        rewards_M = shaped_rewards(trajectories, self.config)
        returns = totals(rewards_M, written_lengths(trajectories)).tolist()
        return dict(zip([t.group_id for t in trajectories], returns, strict=True))

    def starts(self, step: int, nth: int = 0) -> list[EpisodeSpec]:
        """The prompts of a step's `nth` rollout: rows in an order that is shuffled again for each
        epoch, a function of (seed, step).
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

    def rewarded(
        self, trajectories: list[Trajectory], record: RolloutRecord
    ) -> tuple[list[Trajectory], RewardParts]:
        """The trajectories that have a reward, with the reward, and every part of it by name."""
        totals, parts = self.score(trajectories)
        kept = [i for i, total in enumerate(totals) if total is not None]
        self.left_out.add("no_reward", len(totals) - len(kept), self.score.last_failure)
        for i, total in enumerate(totals):
            if total is None:
                record.add_unrewarded(trajectories[i], {name: parts[name][i] for name in parts})
        parts = {name: [values[i] for i in kept] for name, values in parts.items()}
        return [t for t in totals if t is not None], parts


def _flat(groups: Iterable[Sequence[Trajectory]]) -> list[Trajectory]:
    """The trajectories of the groups, in order."""
    return [trajectory for group in groups for trajectory in group]
