"""A bandit over the tiny vocabulary: what a policy earns is a sum that can be computed exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gearshift.batch import PackedBatch
from gearshift.data.chat import render_prompt
from gearshift.engine import Engine
from gearshift.models.hf_forward import hf_hidden
from gearshift.models.load import load_policy
from gearshift.trainers import presets
from gearshift.trainers.rl.config import RLConfig
from tests.gyms import Bandit, arm
from tests.trainers.rl_runs import TINY, merged, trainer

PROMPT = [{"role": "user", "content": "pull"}]
BASE: dict[str, Any] = {
    "steps": 40,
    "rollout": {"prompts": 4, "group_size": 8, "max_new_tokens": 1},
    "save_every": 0,
    "update": {"optimizer": {"lr": 5e-3, "warmup": 0}},
    "value": {"optimizer": {"lr": 1e-2}},
}


def preset_config(name: str, **changes: Any) -> RLConfig:
    """The preset with the bandit's sizes; a weak KL, where it has one, so that the best arm is the
    optimum.
    """
    changes = {"advantage": {"name": presets.RL[name]["advantage"]["name"]}, **changes}
    changes = merged(BASE, changes)
    if name != "distill" and "beta" not in changes.get("kl", {}):
        kl = presets.RL[name].get("kl", {})
        changes["kl"] = {"beta": 1e-3} if kl != {"beta": 0.0} else {}
    if name == "remax":
        changes["rollout"] |= {"group_size": 1, "prompts": 32}
    return RLConfig.model_validate({"algorithm": name, **changes})


def probabilities(engine: Engine, model: PreTrainedModel | None = None) -> torch.Tensor:
    """[V] of the first token of the policy (or of another model of its vocabulary), exactly."""
    ids = torch.tensor(render_prompt(engine.tokenizer, PROMPT))
    N = len(ids)
    batch = PackedBatch(
        ids, torch.arange(N), torch.tensor([0, N]), torch.tensor([-1]), torch.zeros(N).bool()
    )
    model = model or engine.model
    with torch.no_grad():
        last = hf_hidden(model, batch)[-1]
        return model.get_output_embeddings()(last).float().softmax(-1)


def expected_reward(engine: Engine) -> float:
    """The policy's expected reward, over all tokens."""
    texts = [
        engine.tokenizer.decode([t], skip_special_tokens=True)
        for t in range(engine.model.config.vocab_size)
    ]
    return float(probabilities(engine) @ torch.tensor([arm(text) for text in texts]))


def run(name: str, folder: Path, seed: int = 0, **changes: Any) -> tuple[Any, list[float]]:
    """Train; the trainer, and the exact expected reward before the first step and after each."""
    it = trainer(preset_config(name, **changes), folder, environment=Bandit, seed=seed)
    earned = [expected_reward(it.engine)]
    log = it.stage.log

    def log_and_measure(step: int, metrics: dict[str, float], tokens: int, *of: Any) -> None:
        log(step, metrics, tokens, *of)
        earned.append(expected_reward(it.engine))

    it.stage.log = log_and_measure  # type: ignore[method-assign]
    it.train()
    return it, earned


def teacher() -> Any:
    """Another tiny policy, to distil from."""
    model = load_policy(TINY)
    with torch.no_grad():
        torch.manual_seed(1)
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p) * p.std()
    return model
