"""Reinforcement learning that one rank and several must do alike, with its environments and
rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gearshift.data import Mixture
from gearshift.errors import ConfigError
from gearshift.models.adapters import AdapterConfig, add_adapter
from gearshift.models.load import load_classifier, save_model
from gearshift.models.tiny import tiny_model, tiny_tokenizer
from gearshift.rewards.composite import CompositeReward
from gearshift.rewards.config import RewardSource
from gearshift.runtime.distributed import world
from gearshift.trainers.rl.critic import load_critic
from tests.gyms import SayLetters
from tests.scale.outcome import Outcome
from tests.scale.supervised import IDS, OPTIMIZER, STEPS, bert
from tests.trainers.rl_runs import TINY, small, trainer

KL = {"beta": 0.05, "where": "loss", "estimator": "k2"}
GRPO: dict[str, Any] = {
    "advantage": {"name": "grpo"},
    "loss": {"name": "ppo_clip"},
    "kl": KL,
    "rollout": {"group_size": 4, "max_new_tokens": 8},
}
PLAIN: dict[str, Any] = {**GRPO, "kl": {"beta": 0.0}}
HERE = "tests.scale.rl"
HEAD = {"optimizer": OPTIMIZER}
CRITIC = {"kind": "critic", "optimizer": OPTIMIZER}
GAE = {"advantage": {"name": "gae", "whiten": "batch"}, "loss": {"name": "ppo_clip"}}


def merge(settings: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with more keys in their sections."""
    return {**settings, **{k: {**settings.get(k, {}), **more} for k, more in changes.items()}}


def rl(folder: Path, sources: Sequence[dict[str, Any]] = (), **changes: Any) -> Outcome:
    """Three prompts a step; `environment`, `model`, `critic`, `reference` and `examples` as
    `trainer` takes them.
    """
    given = ("environment", "model", "critic", "reference", "examples")
    own = {name: changes.pop(name) for name in given if name in changes}
    changes = {"steps": STEPS, **changes}
    changes["rollout"] = {"prompts": 3, **changes.get("rollout", {})}
    sizes = {"micro_batch_tokens": 64, "optimizer": OPTIMIZER}
    changes["update"] = {**sizes, **changes.get("update", {})}
    score = None
    if sources:
        parts = [RewardSource.model_validate(source) for source in sources]
        score = CompositeReward(parts, TINY, folder, tiny_tokenizer())
    run, error = trainer(small(**changes), folder, score=score, **own), ""
    try:
        run.train()
    except ConfigError as fault:
        error = str(fault)
    found: dict[str, Any] = {"policy": run.engine.model}
    if run.models.critic:
        found |= run.models.critic.modules
    if run.models.head:
        found["head"] = run.models.head
    if run.average:
        found["average"] = run.average.average
    outcome = Outcome.of(folder, found)
    outcome.records["tokens"] = run.stage.micro_batch.tokens
    outcome.records["error"] = error
    outcome.records["left out"] = run.left_out.counts
    outcome.records["state"] = run.state.state_dict()
    if score:
        outcome.records["rewards"] = score.state_dict()
        score.close()
    return outcome


def with_encoder(folder: Path) -> Outcome:
    critic = load_critic(TINY, bert(folder), tiny_tokenizer().decode)
    return rl(folder, critic=critic, value=CRITIC, kl={"beta": 0.0})


def with_adapters(folder: Path) -> Outcome:
    """The reference is the policy with its adapters off."""
    model = tiny_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        add_adapter(model, AdapterConfig(rank=4))
    return rl(folder, model=model, reference=model, **GRPO)


def with_examples(folder: Path) -> Outcome:
    rows = [(ids, [0, *[1] * (len(ids) - 1)]) for ids in IDS]
    mixed = {"batch_size": 3, "weight": 0.5}
    return rl(folder, examples=Mixture([rows], [1.0], 0), **GRPO, sft_mix=mixed)


def with_reward_model(folder: Path) -> Outcome:
    """The reward model and the policy have the same tokens, so what was sampled is scored."""
    model = load_classifier(TINY)
    model.config.pad_token_id = 0
    place = folder / "model"
    world().says(lambda: save_model(place, model, tiny_tokenizer(), "a card"), "a reward model")
    both = [{"source": f"model:{place}", "normalize": True}, {"source": "environment"}]
    return rl(folder, both, **GRPO)


class FailsBySeed(SayLetters):
    """Every episode of the prompts of digits below 5 falls over."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if int(self.messages[0]["content"][-1]) < 5:
            raise RuntimeError("the simulator fell over")
        return super().step(action)


class AllAlike(SayLetters):
    """Every reward is the same."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.5, True, False, {}


class SomeAlike(SayLetters):
    """The rewards of prompts of digits below 5 are all the same."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        return observation, 0.5 if int(self.messages[0]["content"][-1]) < 5 else reward, *rest


def letters(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    """The share of letters."""
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]


def some(prompts: Any, completions: list[str], **columns: Any) -> list[float | None]:
    """The length of an answer; lost for prompts of digits below 3, nothing for an empty answer."""
    digit = int(prompts[0][-1]["content"][-1])
    if digit < 3:
        raise RuntimeError("no reward for this prompt")
    return [float(len(text)) if text else None for text in completions]


def raises(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
    raise RuntimeError("it never works")
