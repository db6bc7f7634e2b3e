"""The records of a step's episodes in `rollouts.jsonl`: texts, tokens, and the figures that
sampling, rewards and training have for each token. This file must not import code that samples or
trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gearshift.batch import PackedBatch
from gearshift.runtime.distributed import world
from gearshift.trainers.left_out import Reason
from gearshift.trainers.rl.batching import RewardParts
from gearshift.types import Trajectory

_FIELDS = {
    "trained_logprobs": ("old_logprobs", 4),
    "ref_logprobs": ("ref_logprobs", 4),
    "advantages": ("advantages", 6),
}
"""For each figure of a token in a record: the field of the batch that has it, and its decimals."""


@dataclass
class RolloutRecord:
    """What one step sampled, and what became of it."""

    tokens: bool = True
    """Whether the records have figures of each token."""
    offset: int = 0
    """What is added to the engine's versions, which begin again in a resumed run, so that the
    record has the number of updates before each token.
    """
    episodes: list[dict[str, Any]] = field(default_factory=list)
    """The records of the episodes that have a reward."""
    lost: list[dict[str, Any]] = field(default_factory=list)
    """The records of those that have none."""
    scores: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(places in the batch, log-probs) of each micro-batch that this rank has trained."""

    def add(self, trajectories: Sequence[Trajectory], parts: RewardParts) -> None:
        """Record episodes that have a reward, with every part of it."""
        for i, trajectory in enumerate(trajectories):
            own = {name: values[i] for name, values in parts.items()}
            self.episodes.append(self._episode(trajectory, own))

    def add_unrewarded(self, trajectory: Trajectory, parts: Mapping[str, float | None]) -> None:
        """Record an episode that lacks a part of its reward."""
        episode = self._episode(trajectory, parts)
        self.lost.append({**episode, "reward": None, "left_out": "no_reward"})

    def add_failed(self, group: int, reason: Reason, why: str) -> None:
        """Record an episode that failed, which has no tokens."""
        self.lost.append({"group_id": group, "left_out": reason, "why": why})

    def keep(self, trajectories: Sequence[Trajectory], reason: str) -> None:
        """Note that the other groups are left out, for this reason where they have none yet."""
        kept = {t.group_id for t in trajectories}
        for episode in self.episodes:
            if episode["group_id"] not in kept:
                episode.setdefault("left_out", reason)

    def with_places(self, batch: PackedBatch) -> PackedBatch:
        """The batch; its tokens know their places in it if only the update computes log-probs."""
        if not self.tokens or batch.old_logprobs is not None:
            return batch
        return replace(batch, places=torch.arange(len(batch), device=batch.input_ids.device))

    def add_scores(self, micro: PackedBatch, logprobs_M: Tensor) -> None:
        """Keep the log-probs of a micro-batch of the update."""
        if micro.places is not None:
            self.scores.append((micro.places[micro.loss_mask], logprobs_M.detach()))

    def add_figures(
        self, trajectories: Sequence[Trajectory], batch: PackedBatch, written_T: Tensor
    ) -> None:
        """Add the figures of each token that was learned from. `batch` holds these trajectories in
        their order, `written_T` [T] is the mask of what the policy wrote in them. Every rank calls
        this.
        """
        if not self.tokens:
            return
        lengths = [sum(t.loss_mask) for t in trajectories]
        waiting: dict[int, Iterator[dict[str, Any]]] = {}
        for t in trajectories:
            if t.group_id not in waiting:
                group = [e for e in self.episodes if e["group_id"] == t.group_id]
                waiting[t.group_id] = iter(group)
        own = [next(waiting[t.group_id]) for t in trajectories]
        written_T = written_T.cpu()
        for name, (source, decimals) in _FIELDS.items():
            values_T = getattr(batch, source)
            if values_T is None and name == "trained_logprobs":
                values_T = self._trained(len(batch))
            if values_T is None:
                continue
            rounded_M = values_T.cpu()[written_T].double().round(decimals=decimals)
            for episode, values in zip(own, rounded_M.split(lengths), strict=True):
                if not values.isnan().any():  # nothing computed them
                    figures = values.tolist()
                    episode[name] = _one_or_all(figures) if name == "advantages" else figures

    def line(self) -> dict[str, Any]:
        """The step's record in `rollouts.jsonl`."""
        lost = {"left_out": self.lost} if self.lost else {}
        return {"episodes": self.episodes, **lost}

    def _trained(self, tokens: int) -> Tensor:
        """[T] log-probs of the update on all ranks; NaN where none computed them."""
        own = [(places.cpu(), logprobs.float().cpu()) for places, logprobs in self.scores]
        values_T = torch.full((tokens,), torch.nan)
        for found in world().gather(own, "log-probs of the records"):
            for places, logprobs in found:
                values_T[places] = logprobs
        return values_T

    def _episode(self, t: Trajectory, parts: Mapping[str, float | None]) -> dict[str, Any]:
        """The record of an episode, with the parts of its reward."""
        info = t.info
        record = {
            "group_id": t.group_id,
            "messages": info.messages,
            "token_ids": t.token_ids[t.prompt_length :],
            "reward": t.reward,
            "finish_reason": t.finish_reason,
            "prompt_length": t.prompt_length,
            "rewards": dict(parts),
            "success": info.success,
        }
        for name, value in (("row", info.row), ("gold", info.gold)):
            if type(value) in (str, int, float):
                record[name] = value
        if self.tokens:
            written = [i for i, mask in enumerate(t.loss_mask) if mask]
            record["prompt_ids"] = t.token_ids[: t.prompt_length]
            record["mask"] = _one_or_all(t.loss_mask[t.prompt_length :])
            record["logprobs"] = [round(t.logprobs[i], 4) for i in written]
            if t.weights_versions:
                record["versions"] = _one_or_all(
                    [t.weights_versions[i] + self.offset for i in written]
                )
        return record


def _one_or_all(values: list[Any]) -> Any:
    """The value that all of them have; or all of them."""
    return values[0] if values and values.count(values[0]) == len(values) else values
