"""Every row of an epoch is learned from, whatever the batch; the last batch takes what is left."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.models.load import ModelConfig, load_classifier, load_policy
from gearshift.models.runner import OF_TOKENS, ModelRunner
from gearshift.models.tiny import tiny_tokenizer
from gearshift.runtime.metrics import read_metrics
from gearshift.trainers.judged import Judged
from gearshift.trainers.preference import PreferenceConfig, train_preference
from gearshift.trainers.process_reward_model import (
    ProcessRewardConfig,
    Steps,
    train_process_reward_model,
)
from gearshift.trainers.reward_model import Pair, RewardModelConfig, train_reward_model
from gearshift.trainers.sft import SFTConfig, train_sft
from gearshift.trainers.stage import Stage
from gearshift.trainers.supervised import SupervisedStageConfig


@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 24),
    tenths=st.integers(1, 35),
    seed=st.integers(0, 9),
)
def test_rows_times_epochs_are_seen(rows: int, batch_size: int, tenths: int, seed: int) -> None:
    config = SupervisedStageConfig(epochs=tenths / 10, batch_size=batch_size)
    mixture = Mixture([range(rows)], [1.0], seed)
    steps = config.steps(rows)
    assert steps == ceil(Fraction(tenths * rows, 10 * batch_size))
    batches = [config.batch(mixture, step) for step in range(steps)]
    seen = [row for batch in batches for row in batch]
    assert len(seen) == ceil(Fraction(tenths * rows, 10))
    assert all(len(batch) == batch_size for batch in batches[:-1]) and batches[-1]
    assert seen == [mixture.example_at(i) for i in range(len(seen))], "the order is the mixture's"
    assert set(Counter(seen).values()) <= {tenths // 10, tenths // 10 + 1}


def test_twenty_three_rows_in_batches_of_sixteen() -> None:
    config = SFTConfig(epochs=1)
    mixture = Mixture([range(23)], [1.0], 0)
    assert config.steps(23) == 2
    assert sorted(config.batch(mixture, 0) + config.batch(mixture, 1)) == list(range(23))
    assert SFTConfig(epochs=3, batch_size=8).steps(64) == 24


SETTINGS: dict[str, Any] = {
    "epochs": 1, "save_every": 0, "optimizer": {"lr": 1e-2, "warmup": 0, "schedule": "constant"},
}  # fmt: skip
TINY = ModelConfig(name="tiny", dtype="float32", device="cpu")
IDS = [[1, 5 + i, 9, 7 + 2 * i, 11][: 3 + i % 3] for i in range(5)]


def engine() -> Engine:
    return Engine(load_policy(TINY), tiny_tokenizer())


def sft(count: int, size: int, folder: Path) -> nn.Module:
    config = SFTConfig.model_validate({**SETTINGS, "batch_size": size})
    rows = Mixture([[(ids, [0, *[1] * (len(ids) - 1)]) for ids in IDS[:count]]], [1.0], 0)
    gears = engine()
    train_sft(config, gears, rows, Stage("s", folder, config.steps(count), 0, config))
    return gears.model


def preference(count: int, size: int, folder: Path) -> nn.Module:
    config = PreferenceConfig.model_validate({**SETTINGS, "batch_size": size})
    rows = [Judged(ids[:2], [ids[2:], [13, 15]], [True, False]) for ids in IDS[:count]]
    gears = engine()
    stage = Stage("s", folder, config.steps(count), 0, config)
    train_preference(config, gears, Mixture([rows], [1.0], 0), stage)
    return gears.model


def reward(count: int, size: int, folder: Path) -> nn.Module:
    config = RewardModelConfig.model_validate({**SETTINGS, "batch_size": size})
    rows = Mixture([[Pair(ids, [*ids[:2], 13, 15]) for ids in IDS[:count]]], [1.0], 0)
    model = load_classifier(TINY)
    stage = Stage("s", folder, config.steps(count), 0, config)
    train_reward_model(config, ModelRunner(model), rows, stage)
    return model


def process(count: int, size: int, folder: Path) -> nn.Module:
    config = ProcessRewardConfig.model_validate({**SETTINGS, "batch_size": size})
    steps = [Steps(ids, [1, len(ids) - 1], [True, False]) for ids in IDS[:count]]
    rows = Mixture([steps], [1.0], 0)
    model = load_classifier(TINY, of_tokens=True)
    stage = Stage("s", folder, config.steps(count), 0, config)
    train_process_reward_model(config, ModelRunner(model, undescribed=OF_TOKENS), rows, stage)
    return model


STAGES = [sft, preference, reward, process]


@pytest.mark.parametrize("train", STAGES)
def test_each_stage_learns_from_the_rows_that_are_left(
    train: Callable[[int, int, Path], nn.Module], tmp_path: Path
) -> None:
    for size in (1, 4):
        train(5, size, tmp_path / f"{size}")
    alone, four = (read_metrics(tmp_path / size / "metrics.jsonl") for size in ("1", "4"))
    assert (len(alone), len(four)) == (5, 2)
    assert sum(r["num_tokens"] for r in four) == sum(r["num_tokens"] for r in alone)


@pytest.mark.parametrize("train", STAGES)
def test_a_batch_of_what_is_left_weighs_each_row_in_full(
    train: Callable[[int, int, Path], nn.Module], tmp_path: Path
) -> None:
    one, four = (train(1, size, tmp_path / f"{size}").state_dict() for size in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in one)
    losses = [read_metrics(tmp_path / f"{size}" / "metrics.jsonl")[0]["loss"] for size in (1, 4)]
    assert losses[0] == losses[1] != 0
