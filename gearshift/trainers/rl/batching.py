"""What a rollout is to a trainer: trajectories as one packed batch, their rewards in rows, and what
the log says of them.

Legend: N completions, A longest completion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from gearshift.batch import PackedBatch, pack_groups
from gearshift.rollouts.backend import GenerationBackend
from gearshift.types import Trajectory

Parts = dict[str, list[float | None]]
"""Every part of the rewards by its name, a value for each trajectory."""


def by_group(trajectories: Iterable[Trajectory]) -> dict[int, list[Trajectory]]:
    """The groups, in the order in which they first appear."""
    groups: dict[int, list[Trajectory]] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, []).append(t)
    return groups


def has_zero_std(group: Sequence[Trajectory]) -> bool:
    """Whether all rewards of a group are equal, so that a baseline of the group leaves nothing."""
    return pstdev(t.reward for t in group) < 1e-8


def pack_trajectories(trajectories: Sequence[Trajectory], micro_batch_tokens: int) -> PackedBatch:
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
        ],
        micro_batch_tokens=micro_batch_tokens,
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


def turn_lengths(trajectory: Trajectory) -> list[int]:
    """Tokens that the policy wrote in each turn."""
    runs = groupby(trajectory.loss_mask)
    return [len(list(run)) for written, run in runs if written]


def turn_ends(trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, Tensor]:
    """[K] of all turns: whose it is, the place of its last token in that row, and its length."""
    lengths = [turn_lengths(t) for t in trajectories]
    rows = [row for row, own in enumerate(lengths) for _ in own]
    ends = [end - 1 for own in lengths for end in accumulate(own)]
    return torch.tensor(rows), torch.tensor(ends), torch.tensor([n for own in lengths for n in own])


def given_rewards(trajectories: Sequence[Trajectory], mask_NA: Tensor) -> Tensor:
    """[N, A] True at the tokens at which a reward was given."""
    given_NA = torch.zeros_like(mask_NA)
    rows, ends, _ = turn_ends(trajectories)
    given_NA[rows, ends] = True
    for row_A, t in zip(given_NA, trajectories, strict=True):
        if t.rewarded is not None:
            row_A[:] = False
            row_A[[sum(t.loss_mask[:i]) for i in t.rewarded]] = True
    return given_NA


def minibatches(batch: PackedBatch, count: int, order: torch.Generator) -> list[PackedBatch]:
    """The batch's trees dealt into `count` batches in a random order; the batch itself for one.
    Fewer where there are fewer trees: episodes were lost.
    """
    trees = batch.trees()
    count = min(count, len(trees))
    if count == 1:
        return [batch]
    shuffled = [trees[i] for i in torch.randperm(len(trees), generator=order)]
    return [
        PackedBatch.join([batch.slice(*tree) for tree in shuffled[i::count]]) for i in range(count)
    ]


def describe_rollout(trajectories: Sequence[Trajectory], parts: Parts) -> dict[str, float]:
    """What was sampled, in TRL's names where it has one; `docs/metrics.md` defines each."""
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
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": fmean(t.finish_reason == "length" for t in trajectories),
    }
    for name, values in parts.items():
        known = [v for v in values if v is not None]
        if known:
            metrics[f"rewards/{name}/mean"] = fmean(known)
            metrics[f"rewards/{name}/std"] = pstdev(known)
    return metrics


def describe_generation(backend: GenerationBackend) -> dict[str, float]:
    """Where the generation gear's time went in this step."""
    return {f"engine/{name}": value for name, value in backend.stats().items()}


def record(trajectory: Trajectory) -> dict[str, Any]:
    """What `rollouts.jsonl` keeps of an episode."""
    return {
        "group_id": trajectory.group_id,
        "messages": trajectory.info.messages,
        "token_ids": trajectory.token_ids[trajectory.prompt_length :],
        "reward": trajectory.reward,
        "finish_reason": trajectory.finish_reason,
    }
