"""Makes one packed batch, rewards at tokens and metrics from a rollout's trajectories. It must not
import code that samples or trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from math import isnan, nan
from statistics import fmean, pstdev

import torch
from torch import Tensor

from gearshift.batch import PackedBatch, pack_groups
from gearshift.rollouts.backend import GenerationBackend
from gearshift.runtime.distributed import world
from gearshift.types import Trajectory

RewardParts = dict[str, list[float | None]]
"""Each part of the rewards by its name, with a value for each trajectory."""


def by_group(trajectories: Iterable[Trajectory]) -> dict[int, list[Trajectory]]:
    """The groups, in the order in which they first appear."""
    groups: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, []).append(t)
    return groups


def has_zero_std(group: Sequence[Trajectory]) -> bool:
    """Whether all rewards of a group are equal, so that a baseline of the group leaves nothing."""
    return pstdev(t.reward for t in group) < 1e-8


def pack_trajectories(trajectories: Sequence[Trajectory]) -> PackedBatch:
    """Groups with their prompt stored once, in the order of the trajectories, which come group by
    group.
    """
    batch = pack_groups(
        [
            (
                members[0].token_ids[: members[0].prompt_length],
                [(t.token_ids[t.prompt_length :], t.loss_mask[t.prompt_length :]) for t in members],
            )
            for members in by_group(trajectories).values()
        ]
    )
    sampled = [
        logprob
        for t in trajectories
        for logprob, mask in zip(t.logprobs, t.loss_mask, strict=True)
        if mask
    ]
    return batch.with_scored(sampler_logprobs=torch.tensor(sampled))


def place_rewards(trajectories: Sequence[Trajectory]) -> Tensor:
    """[M] rewards at the tokens that the policy wrote."""
    return torch.tensor(
        [
            reward
            for t in trajectories
            for reward, written in zip(t.rewards, t.loss_mask, strict=True)
            if written
        ],
        dtype=torch.float32,
    )


def written_lengths(trajectories: Sequence[Trajectory]) -> Tensor:
    """[N]: how many tokens the policy wrote in each trajectory."""
    return torch.tensor([sum(t.loss_mask) for t in trajectories])


def turns(trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor]:
    """[K] of all turns: the place of the turn's last token among the M written ones, and the turn's
    length.
    """
    runs = (run for t in trajectories for run in groupby(t.loss_mask))
    lengths_K = torch.tensor([len(list(run)) for written, run in runs if written])
    return lengths_K.cumsum(0) - 1, lengths_K


def given_rewards(trajectories: Sequence[Trajectory]) -> Tensor:
    """[M] True at the tokens at which a reward was given."""
    lengths = written_lengths(trajectories)
    given_M = torch.zeros(int(lengths.sum()), dtype=torch.bool)
    given_M[turns(trajectories)[0]] = True
    for own, t in zip(given_M.split(lengths.tolist()), trajectories, strict=True):
        if t.rewarded is not None:
            own[:] = False
            own[[sum(t.loss_mask[:i]) for i in t.rewarded]] = True
    return given_M


def minibatches(batch: PackedBatch, count: int, order: torch.Generator) -> list[PackedBatch]:
    """The batch's groups dealt into `count` batches in a random order; the batch itself for one.
    Fewer where there are fewer groups: episodes were lost.
    """
    groups = batch.prompt_groups()
    count = min(count, len(groups))
    if count == 1:
        return [batch]
    shuffled = [groups[i] for i in torch.randperm(len(groups), generator=order)]
    return [
        PackedBatch.join([batch.slice(*tree) for tree in shuffled[i::count]]) for i in range(count)
    ]


def describe_rollout(trajectories: Sequence[Trajectory], parts: RewardParts) -> dict[str, float]:
    """The metrics of what was sampled; `docs/metrics.md` defines each."""
    if not trajectories:
        return {}
    lengths = [sum(t.loss_mask) for t in trajectories]
    groups = by_group(trajectories).values()
    metrics = {
        "reward": fmean(t.reward for t in trajectories),
        "reward_std": fmean(pstdev(t.reward for t in group) for group in groups),
        "frac_reward_zero_std": fmean(map(has_zero_std, groups)),
        "success": fmean(t.info.success for t in trajectories),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(t.finish_reason == "length" for t in trajectories),
    }
    pairs = zip(lengths, trajectories, strict=True)
    if ended := [length for length, t in pairs if t.finish_reason != "length"]:
        metrics["completions/mean_terminated_length"] = fmean(ended)
        metrics["completions/min_terminated_length"] = float(min(ended))
        metrics["completions/max_terminated_length"] = float(max(ended))
    for name, values in parts.items():
        known = [v for v in values if v is not None]
        if known:
            metrics[f"rewards/{name}/mean"] = fmean(known)
            metrics[f"rewards/{name}/std"] = pstdev(known)
    return metrics


def describe_generation(backend: GenerationBackend) -> dict[str, float]:
    """How the generation gear spent its time in this step: counts and rates are those of all ranks
    together, seconds and shares are a rank's on average.
    """
    ranks = world().gather(backend.stats(), "figures of the generation")
    figures = {}
    for name in ranks[0]:
        known = [stats[name] for stats in ranks if not isnan(stats[name])] or [nan]
        added = not name.endswith(("_seconds", "_fraction"))
        figures[f"engine/{name}"] = sum(known) if added else fmean(known)
    return figures
