"""Measures how far the two gears' log-probabilities of the same tokens lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gearshift.batch import PackedBatch
from gearshift.engine import Engine
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.runtime.distributed import world
from gearshift.trainers.rl.batching import pack_trajectories
from gearshift.types import SamplingParams


@torch.no_grad()
def logprob_gap(
    engine: Engine, collector: Collector, starts: Sequence[EpisodeSpec], params: SamplingParams
) -> dict[str, float]:
    """Mean and greatest |difference| in nats over completions sampled afresh from `starts`, and how
    many tokens these have; only that where no episode came to its end.
    """
    with collector.generating():
        trajectories = collector.collect(starts, params, rewarded="any")
    if not trajectories:
        return {"tokens": 0.0}
    batch = pack_trajectories(trajectories).to(engine.device)

    def gaps(micros: Sequence[PackedBatch]) -> list[Tensor]:
        with engine.training(), torch.no_grad():
            scored = [engine.logprobs(micro, params.temperature).logprobs for micro in micros]
        pairs = zip(micros, scored, strict=True)
        return [(own - micro.scored("sampler_logprobs")).abs() for micro, own in pairs]

    micros = list(batch.split_groups(4096, world().size))
    gap_M = torch.cat([part.cpu() for part in world().dealt(micros, gaps)])
    return {"mean": float(gap_M.mean()), "max": float(gap_M.max()), "tokens": float(len(gap_M))}
