"""`algorithm: NAME` in a recipe: the keys that a published method stands for.

A preset lies under what the recipe says itself, so that any key may be overridden; `--dry-run`
shows the result. `docs/algorithms.md` has a row for each, with its paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Algorithm = Literal[
    "reinforce", "reinforce_ma", "ppo", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo",
    "reinforce_pp", "reinforce_pp_baseline", "remax", "opo", "raft", "distill",
    "dpo", "cdpo", "ipo", "kto", "orpo", "simpo",
]  # fmt: skip

_NO_KL = {"beta": 0.0}
_K1_IN_REWARD = {"estimator": "k1", "where": "reward"}

RL: dict[str, dict[str, Any]] = {
    "reinforce": {"advantage": "reinforce", "loss": "reinforce", "kl": _K1_IN_REWARD},
    "reinforce_ma": {"advantage": "moving_average", "loss": "reinforce", "kl": _K1_IN_REWARD},
    "ppo": {
        "advantage": "gae", "gamma": 1.0, "lam": 0.95, "whiten": "batch", "loss": "ppo_clip",
        "clip_low": 0.2, "clip_high": 0.2, "value": "critic", "value_clip": 0.2,
        "value_optimizer": {"lr": 5e-6}, "reward_clip": 5.0, "kl": {"beta": 0.1, **_K1_IN_REWARD},
    },
    "rloo": {"advantage": "rloo", "loss": "reinforce", "kl": _K1_IN_REWARD},
    "grpo": {
        "advantage": "grpo", "loss": "ppo_clip", "aggregation": "sequence_mean",
        "kl": {"beta": 0.04, "estimator": "k3", "where": "loss"},
    },
    "dr_grpo": {
        "advantage": "dr_grpo", "loss": "ppo_clip", "aggregation": "fixed_length", "kl": _NO_KL,
    },
    "dapo": {
        "advantage": "grpo", "loss": "ppo_clip", "clip_low": 0.2, "clip_high": 0.28,
        "aggregation": "token_mean", "overlong_buffer": 0.2, "dynamic_sampling": 2, "kl": _NO_KL,
    },
    "gspo": {
        "advantage": "grpo", "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4,
        "aggregation": "sequence_mean", "kl": _NO_KL,
    },
    "cispo": {
        "advantage": "grpo", "loss": "cispo", "clip_low": 1.0, "clip_high": 4.0,
        "aggregation": "token_mean", "kl": _NO_KL,
    },
    "sapo": {
        "advantage": "grpo", "loss": "sapo", "tau_positive": 1.0, "tau_negative": 1.05,
        "aggregation": "sequence_mean", "kl": _NO_KL,
    },
    "reinforce_pp": {
        "advantage": "returns", "whiten": "batch", "loss": "ppo_clip",
        "kl": {"beta": 0.01, **_K1_IN_REWARD},
    },
    "reinforce_pp_baseline": {
        "advantage": "dr_grpo", "whiten": "batch", "loss": "ppo_clip",
        "kl": {"beta": 0.01, "estimator": "k2", "where": "loss"},
    },
    "remax": {
        "advantage": "remax", "group_size": 1, "loss": "reinforce", "kl": _K1_IN_REWARD,
    },
    "opo": {"advantage": "opo", "loss": "reinforce", "kl": _NO_KL},
    "raft": {"advantage": "best_of_n", "loss": "reinforce", "kl": _NO_KL},
    "distill": {
        "advantage": "returns", "gamma": 0.0, "loss": "reinforce",
        "kl": {"beta": 1.0, **_K1_IN_REWARD},
        "rewards": [{"source": "environment", "weight": 0.0}],
    },
}  # fmt: skip
"""Of the section `rl`."""

PREFERENCE: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.1},
    "cdpo": {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.1},
    "kto": {"loss": "kto", "beta": 0.1},
    "orpo": {"loss": "orpo", "beta": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0, "margin": 1.0},
}
"""Of the section `preference`, which then stands in place of `rl`. Where it names no data, it takes
those of `reward`, in place of it."""


def expand(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe's tree with the keys of its `algorithm` filled in, where it does not set them."""
    name = recipe.get("algorithm")
    if name in RL and recipe.get("rl", {}) is not None:  # a stage set to null stays out
        return {**recipe, "rl": _under(RL[name], recipe.get("rl", {}))}
    if name in PREFERENCE:
        own, reward = recipe.get("preference") or {}, recipe.get("reward") or {}
        if not own.get("data"):  # the reward model's pairs, which it is not needed for then
            own = {**own, **{k: reward[k] for k in ("data", "heldout") if k in reward}}
            recipe = {**recipe, "reward": None}
        return {**recipe, "preference": _under(PREFERENCE[name], own), "rl": None}
    return recipe


def _under(preset: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**preset, **own}
    for key, value in preset.items():
        if isinstance(value, Mapping) and isinstance(own.get(key), Mapping):
            merged[key] = _under(value, own[key])
    return merged
