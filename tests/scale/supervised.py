"""Supervised trainings that one rank and several must do alike: policies and reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from gearshift.data import Mixture
from gearshift.engine import Engine
from gearshift.errors import NumericalError
from gearshift.models.load import ModelConfig, load_classifier, load_policy, save_model
from gearshift.models.runner import OF_TOKENS, ModelRunner
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.runtime.distributed import world
from gearshift.trainers.preference import (
    Judged,
    PreferenceConfig,
    PreferenceLoss,
    train_preference,
)
from gearshift.trainers.process_reward_model import (
    ProcessRewardConfig,
    Steps,
    step_accuracy,
    train_process_reward_model,
)
from gearshift.trainers.reward_model import Pair, RewardModelConfig, train_reward_model
from gearshift.trainers.sft import SFTConfig, train_sft
from gearshift.trainers.stage import Stage
from tests.scale.outcome import Outcome
from tests.trainers.rl_runs import TINY

# Adam divides by the gradient's size: with a small eps, the last digits of a weight whose gradient
# is nearly 0 become a whole step.
OPTIMIZER = {"lr": 1e-3, "eps": 1e-4, "warmup": 0}
SETTINGS: dict[str, Any] = {
    "epochs": 1, "save_every": 0, "batch_size": 6, "micro_batch_tokens": 24, "optimizer": OPTIMIZER,
}  # fmt: skip
IDS = [[1, 5 + i, 9, 7 + 2 * i, 11, 3, 8 + i, 30 + i, 2 * i][: 4 + 5 * i % 6] for i in range(16)]
STEPS = 3  # 6 rows, 6 rows, and 4


def sft(folder: Path, dtype: str = "float32", masked: int = 0, **changes: Any) -> Outcome:
    """Rows of several lengths. The first `masked` of each three rows have one trained token."""
    config = SFTConfig.model_validate({**SETTINGS, **changes})
    rows = [
        (ids, [0, *[0 if i % 3 < masked else 1] * (len(ids) - 2), 1]) for i, ids in enumerate(IDS)
    ]
    model = load_policy(ModelConfig.model_validate({**TINY.model_dump(), "dtype": dtype}))
    engine = Engine(model, tiny_tokenizer())
    stage = Stage("sft", folder, STEPS, 0, config)
    error = ""
    try:
        train_sft(config, engine, Mixture([rows], [1.0], 0), stage)
    except NumericalError as fault:
        error = str(fault)
    outcome = Outcome.of(folder, {"policy": model})
    gradients = any(p.grad is not None for p in model.parameters())
    left = world().gather(gradients, "gradients that are left")
    outcome.records = {"tokens": stage.micro_batch.tokens, "error": error, "left": left[0]}
    assert len(set(left)) == 1, left
    return outcome


def reward(folder: Path, encoder: bool = False, **changes: Any) -> Outcome:
    config = RewardModelConfig.model_validate({**SETTINGS, "center": 0.01, **changes})
    rows = [Pair(ids, [*ids[:2], 13, *range(15, 15 + i % 4)]) for i, ids in enumerate(IDS)]
    model = load_classifier(TINY, bert(folder) if encoder else None)
    model.config.pad_token_id = 0
    stage = Stage("reward", folder, STEPS, 0, config)
    train_reward_model(config, ModelRunner(model), Mixture([rows], [1.0], 0), stage)
    return Outcome.of(folder, {"model": model})


def process(folder: Path) -> Outcome:
    config = ProcessRewardConfig.model_validate(SETTINGS)
    rows = [Steps(ids, [1, len(ids) - 1], [True, i % 3 == 0]) for i, ids in enumerate(IDS)]
    model = load_classifier(TINY, of_tokens=True)
    model.config.pad_token_id, model.dropout.p = 0, 0.0
    stage = Stage("process", folder, STEPS, 0, config)
    runner = ModelRunner(model, undescribed=OF_TOKENS)
    train_process_reward_model(config, runner, Mixture([rows], [1.0], 0), stage)
    outcome = Outcome.of(folder, {"model": model})
    outcome.records["accuracy"] = step_accuracy(runner, rows)
    return outcome


def preference(folder: Path, loss: str, each_step: bool = False) -> Outcome:
    config = PreferenceConfig.model_validate({**SETTINGS, "loss": loss})
    rows = []
    for i, ids in enumerate(IDS):
        good = [True] if loss == "kto" and i % 3 else [True, False]
        rows.append(Judged(ids[:2], [ids[2:], [13, 15]][: len(good)], good))
        rows[-1].other = [4, 6 + i]
    engine = Engine(tiny_model(), tiny_tokenizer())
    reference = ModelRunner(tiny_model()) if each_step else None
    stage = Stage("preference", folder, STEPS, 0, config)
    train_preference(config, engine, Mixture([rows], [1.0], 0), stage, reference)
    outcome = Outcome.of(folder, {"policy": engine.model})
    outcome.metrics = without_ties(outcome.metrics)
    if loss == "dpo":
        judge = PreferenceLoss(config, engine, ModelRunner(tiny_model()))
        judge.ask_reference(rows)
        outcome.records["accuracy"] = judge.accuracy(rows)
    return outcome


def without_ties(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics, less the first step's accuracy: a policy that is the reference prefers nothing,
    and the last digits decide.
    """
    return [{k: v for k, v in metrics[0].items() if k != "rewards/accuracies"}, *metrics[1:]]


def bert(folder: Path) -> str:
    """The folder of a small random BERT with a score, which the main rank saves."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, num_labels=1, max_position_embeddings=256, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    place = folder / "bert"
    world().says(lambda: save_model(place, model, tiny_tokenizer(), "a card"), "a small encoder")
    return str(place)
