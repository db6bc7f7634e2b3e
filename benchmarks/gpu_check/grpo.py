"""Step 8: whole steps of reinforcement learning, and what must hold of the first."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, ClassVar

import torch

from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_of, llama, model_of, quick_limits
from benchmarks.gpu_check.probe import Probe
from gearshift.environments.base import TextEnvironment
from gearshift.models.runner import ModelRunner
from gearshift.rollouts.collector import Collector
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers.rl.config import RLConfig
from gearshift.trainers.rl.loop import RLTrainer
from gearshift.trainers.stage import Stage
from gearshift.types import Message, Trajectory


class Asks(TextEnvironment):
    """One question of about a hundred bytes; the answer is rewarded elsewhere."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        text = f"question {self.np_random.integers(0, 10**6)} " * 4
        messages: list[Message] = [{"role": "user", "content": text}]
        return text, {"messages": messages, "row": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, True, False, {}


class Even:
    """The reward is the share of even tokens in what was written."""

    missing: ClassVar[dict[str, float]] = {}
    environment_weight = 0.0
    last_failure = ""

    def begin(self, group: list[Trajectory]) -> None:
        """Nothing is computed ahead."""

    def __call__(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[Trajectory | None], dict[str, list[float | None]]]:
        scored: list[Trajectory | None] = []
        shares: list[float | None] = []
        for one in trajectories:
            pairs = zip(one.token_ids, one.loss_mask, strict=True)
            written = [token for token, mask in pairs if mask]
            share = sum(token % 2 == 0 for token in written) / max(1, len(written))
            last = max(i for i, mask in enumerate(one.loss_mask) if mask)
            rewards = [share if i == last else 0.0 for i in range(len(one.token_ids))]
            scored.append(replace(one, rewards=rewards))
            shares.append(share)
        return scored, {"even": shares}

    def state_dict(self) -> dict[str, Any]:
        """It has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has no state."""


def trainer(
    probe: Probe, shape: str, folder: Path, dtype: torch.dtype, steps: int, save_every: int = 0,
    **rollout: Any,
) -> RLTrainer:  # fmt: skip
    """GRPO with a reference, on a model of this shape."""
    rollout = {"prompts": 8, "group_size": 8, "max_new_tokens": probe.size(128, 6), **rollout}
    update = {
        "micro_batch_tokens": probe.size(16_384, 1024),
        "optimizer": {"lr": probe.size(2e-5, 1e-2), "warmup": 0},
    }
    config = RLConfig.model_validate(
        {"algorithm": "grpo", "steps": steps, "rollout": rollout, "update": update,
         "save_every": save_every}
    )  # fmt: skip
    quick_limits(probe)
    rows = rollout["prompts"] * rollout["group_size"]
    longest = probe.size(512, 256)
    engine = engine_of(probe, shape, dtype, max_num_seqs=rows, max_length=longest)
    reference = ModelRunner(model_of(probe, llama(probe, shape), dtype).requires_grad_(False))
    collector = Collector(Asks, engine.tokenizer, engine.loop)
    stage = Stage("rl", folder, config.steps, 0, config)
    return RLTrainer(config, engine, collector, None, Even(), stage, reference)


def of_135m(probe: Probe) -> None:
    """The smaller model."""
    learned(probe, "135M")


def of_1b(probe: Probe) -> None:
    """The larger one."""
    learned(probe, "1B")


def learned(probe: Probe, shape: str) -> None:
    """Eight steps."""
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(probe, shape, Path(folder) / "rl", torch.bfloat16, steps=8)
        made.train()
        steps = read_metrics(Path(folder) / "rl" / "metrics.jsonl")
    first = steps[0]
    probe.at_most(f"{shape}: first ratio, from 1", abs(first["ratio"] - 1.0), 1e-6)
    probe.at_most(f"{shape}: first clip fraction", first["clip_ratio/region_mean"], 0.0)
    probe.at_most(f"{shape}: first KL to the reference", abs(first["kl"]), 1e-6, "nat")
    gaps = [step["sampling/sampling_logp_difference/mean"] for step in steps]
    probe.at_most(f"{shape}: gap of the gears (mean)", max(gaps), 0.01, "nat")
    rewards = [step["reward"] for step in steps]
    rises = fmean(rewards[-3:]) > fmean(rewards[:3])
    probe.holds(f"{shape}: the reward rises", rises, rewards)
    names = ("step_time", "seconds/generate", "seconds/score", "seconds/train")
    names += ("engine/prefill_seconds", "engine/decode_seconds", "engine/shift_seconds")
    found = {n.split("/")[-1]: median(s[n] for s in steps[2:]) for n in names if n in first}
    probe.shows(f"{shape}: seconds of a step", found, "s")
    if probe.cuda:
        peaks = {n.split("/")[-1]: max(s[n] for s in steps) for n in first if "peak_gib" in n}
        probe.shows(f"{shape}: peaks by phase", peaks, "GiB")
        used = median(s.get("speed/mfu", 0.0) for s in steps[2:])
        probe.shows(f"{shape}: MFU of the updates", used)
    rate = median(step["num_tokens"] / step["step_time"] for step in steps[2:])
    probe.shows(f"{shape}: tokens of a step a second", rate, "tokens/s")


PARTS = (Part(of_135m, 20), Part(of_1b, 20, tiny=False))
