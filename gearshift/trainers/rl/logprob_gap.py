"""Measures how far the two gears' log-probabilities of the same tokens lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gearshift.engine import Engine
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.trainers.rl.batching import pack_trajectories
from gearshift.types import SamplingParams


@torch.no_grad()
def logprob_gap(
    engine: Engine, collector: Collector, starts: Sequence[EpisodeSpec], params: SamplingParams
) -> dict[str, float]:
    """Mean and greatest |difference| in nats over completions sampled afresh from `starts`, and how
    many tokens these have; only that where no episode came to its end.
    """
    with engine.generating():
        trajectories = collector.collect(starts, params, rewarded="any")
    if not trajectories:
        return {"tokens": 0.0}
    batch = pack_trajectories(trajectories).to(engine.device)
    gaps = []
    for micro in batch.split_groups(4096):
        with engine.training(), torch.no_grad():
            scored = engine.logprobs(micro, params.temperature).logprobs
        gaps.append((scored - micro.scored("sampler_logprobs")).abs())
    gap_M = torch.cat(gaps)
    return {"mean": float(gap_M.mean()), "max": float(gap_M.max()), "tokens": float(len(gap_M))}
