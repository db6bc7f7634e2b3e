"""Step 10: a run that was cut and resumed is the run that was not."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.gpu_check.grpo import trainer
from benchmarks.gpu_check.harness import Part
from benchmarks.gpu_check.models import engine_of
from benchmarks.gpu_check.probe import Probe
from gearshift.data import Mixture
from gearshift.trainers.sft import SFTConfig, train_sft
from gearshift.trainers.stage import Stage

STEPS, CUT = 6, 3


def supervised(probe: Probe) -> None:
    """Supervised fine-tuning: as it is, and with torch's deterministic algorithms."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    told(probe, "SFT", learn_rows, asserted=not probe.cuda)
    torch.use_deterministic_algorithms(True, warn_only=True)
    told(probe, "SFT, deterministic", learn_rows, asserted=True)


def reinforced(probe: Probe) -> None:
    """Reinforcement learning. On a card the order in which episodes end may change sums."""
    told(probe, "GRPO", learn_by_reward, asserted=not probe.cuda)


def told(
    probe: Probe, name: str, learn: Callable[[Probe, Path], PreTrainedModel], asserted: bool
) -> None:
    """Compare 6 steps with 3 steps, a checkpoint, and 3 more."""
    with tempfile.TemporaryDirectory() as place:
        one, other = Path(place) / "one", Path(place) / "other"
        whole = learn(probe, one)
        before, exact = digest(whole), [p.detach().clone() for p in whole.parameters()]
        del whole
        probe.tidy()
        shutil.copytree(one, other)
        newest = sorted(path.name for path in (other / "checkpoints").iterdir())
        probe.holds(f"{name}: its checkpoint is of step {CUT}", newest == [f"step-{CUT:06d}"])
        resumed = learn(probe, other)
    pairs = zip(exact, [p.detach() for p in resumed.parameters()], strict=True)
    most = max(float((a - b).abs().max()) for a, b in pairs)
    same = digest(resumed) == before
    if asserted:
        probe.holds(f"{name}: resumed is the same, bit by bit", same, same if same else most)
    else:
        probe.shows(f"{name}: resumed, largest difference of a weight", most)


def learn_rows(probe: Probe, folder: Path) -> PreTrainedModel:
    """The model after all steps that were not done in this folder."""
    engine = engine_of(probe, "135M", max_length=256)
    rng = random.Random(0)
    rows = []
    for _ in range(48):
        length = rng.randint(*probe.size((32, 256), (4, 12)))
        rows.append(([rng.randrange(3, engine.vocabulary) for _ in range(length)], [1] * length))
    rows = [(ids, [0, *mask[1:]]) for ids, mask in rows]
    config = SFTConfig.model_validate(
        {"epochs": 1, "batch_size": 8, "micro_batch_tokens": probe.size(512, 24),
         "optimizer": {"lr": 1e-4}, "save_every": CUT}
    )  # fmt: skip
    mixture = Mixture([rows], [1.0], seed=0)
    train_sft(config, engine, mixture, Stage("sft", folder, STEPS, 0, config))
    return engine.model


def learn_by_reward(probe: Probe, folder: Path) -> PreTrainedModel:
    """The same by GRPO."""
    sizes = {"prompts": 2, "group_size": 4, "max_new_tokens": probe.size(32, 4)}
    made = trainer(probe, "135M", folder, torch.bfloat16, STEPS, save_every=CUT, **sizes)
    made.train()
    return made.engine.model


def digest(model: PreTrainedModel) -> str:
    """SHA-256 of all weights."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


PARTS = (Part(supervised, 14), Part(reinforced, 11))
