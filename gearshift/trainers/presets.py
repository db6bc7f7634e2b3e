"""Published methods by name, `algorithm: NAME`: the keys that each stands for.

A preset lies under what is said beside it, so that any key may be overridden; `--dry-run` shows the
result. `docs/algorithms.md` has a row for each, with its paper. This file knows names and keys, and
must import no config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from gearshift.algorithms.advantages import NEEDS_VALUES

RLAlgorithm = Literal[
    "reinforce", "reinforce_ma", "ppo", "rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo",
    "reinforce_pp", "reinforce_pp_baseline", "remax", "opo", "raft", "distill",
]  # fmt: skip
PreferenceAlgorithm = Literal["dpo", "cdpo", "ipo", "kto", "orpo", "simpo"]
Algorithm = Literal[RLAlgorithm, PreferenceAlgorithm]

_NO_KL = {"beta": 0.0}
_K1_IN_REWARD = {"estimator": "k1", "where": "reward"}
_REINFORCE = {"name": "reinforce"}
_PPO = {"name": "ppo_clip"}

RL: dict[str, dict[str, Any]] = {
    "reinforce": {
        "advantage": {"name": "value_baseline"}, "loss": _REINFORCE, "kl": _K1_IN_REWARD,
    },
    "reinforce_ma": {
        "advantage": {"name": "moving_average"}, "loss": _REINFORCE, "kl": _K1_IN_REWARD,
    },
    "ppo": {
        "advantage": {"name": "gae", "gamma": 1.0, "lam": 0.95, "whiten": "batch"},
        "loss": {**_PPO, "clip_low": 0.2, "clip_high": 0.2},
        "value": {"kind": "critic", "clip": 0.2, "optimizer": {"lr": 5e-6}},
        "shaping": {"clip": 5.0},
        "kl": {"beta": 0.1, **_K1_IN_REWARD},
    },
    "rloo": {"advantage": {"name": "rloo"}, "loss": _REINFORCE, "kl": _K1_IN_REWARD},
    "grpo": {
        "advantage": {"name": "grpo"}, "loss": {**_PPO, "aggregation": "sequence_mean"},
        "kl": {"beta": 0.04, "estimator": "k3", "where": "loss"},
    },
    "dr_grpo": {
        "advantage": {"name": "dr_grpo"}, "loss": {**_PPO, "aggregation": "fixed_length"},
        "kl": _NO_KL,
    },
    "dapo": {
        "advantage": {"name": "grpo"},
        "loss": {**_PPO, "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean"},
        "shaping": {"overlong_buffer": 0.2}, "rollout": {"replace_zero_std": 2}, "kl": _NO_KL,
    },
    "gspo": {
        "advantage": {"name": "grpo"},
        "loss": {
            "name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean",
        },
        "kl": _NO_KL,
    },
    "cispo": {
        "advantage": {"name": "grpo"},
        "loss": {"name": "cispo", "clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"},
        "kl": _NO_KL,
    },
    "sapo": {
        "advantage": {"name": "grpo"},
        "loss": {
            "name": "sapo", "tau_positive": 1.0, "tau_negative": 1.05,
            "aggregation": "sequence_mean",
        },
        "kl": _NO_KL,
    },
    "reinforce_pp": {
        "advantage": {"name": "none", "whiten": "batch"}, "loss": _PPO,
        "kl": {"beta": 0.01, **_K1_IN_REWARD},
    },
    "reinforce_pp_baseline": {
        "advantage": {"name": "dr_grpo", "whiten": "batch"}, "loss": _PPO,
        "kl": {"beta": 0.01, "estimator": "k2", "where": "loss"},
    },
    "remax": {
        "advantage": {"name": "remax"}, "rollout": {"group_size": 1}, "loss": _REINFORCE,
        "kl": _K1_IN_REWARD,
    },
    "opo": {"advantage": {"name": "opo"}, "loss": _REINFORCE, "kl": _NO_KL},
    "raft": {"advantage": {"name": "best_of_n"}, "loss": _REINFORCE, "kl": _NO_KL},
    "distill": {
        "advantage": {"name": "none", "gamma": 0.0}, "loss": _REINFORCE,
        "kl": {"beta": 1.0, **_K1_IN_REWARD},
        "rewards": [{"source": "environment", "weight": 0.0}],
    },
}  # fmt: skip
"""The keys of the section `rl`."""

PREFERENCE: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo", "beta": 0.1},
    "cdpo": {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"loss": "ipo", "beta": 0.1},
    "kto": {"loss": "kto", "beta": 0.1},
    "orpo": {"loss": "orpo", "beta": 0.1},
    "simpo": {"loss": "simpo", "beta": 2.0, "margin": 1.0},
}
"""The keys of the section `preference`, which then stands in place of `rl`. Where it names no data,
it takes the data of `reward`, in place of it."""

_PLAIN = {
    "advantage": {"name": "value_baseline"}, "loss": _REINFORCE, "value": {"kind": "head"},
}  # fmt: skip


def rl_filled(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section `rl` with the keys of its `algorithm` filled in where it does not set them, and
    with the kinds of its advantage, its loss and the value net that this advantage needs.

    A section of another kind than the preset's stands alone.
    """
    own = {key: value for key, value in section.items() if key != "value" or value is not None}
    tree = _under(_under(_PLAIN, _preset(RL, section)), own)
    if kind_of(tree["advantage"], "name") not in NEEDS_VALUES:
        tree["value"] = own.get("value")
    return tree


def preference_filled(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section `preference` with the keys of its `algorithm` filled in where it does not set
    them.
    """
    return _under(_preset(PREFERENCE, section), section)


def algorithm_of(recipe: Mapping[str, Any]) -> Any:
    """The `algorithm` of a recipe's tree; that of a section counts as the recipe's."""
    name = recipe.get("algorithm")
    for section in ("rl", "preference"):
        name = name or kind_of(recipe.get(section), "algorithm")
    return name if isinstance(name, str) else None


def takes_pairs_of_reward(recipe: Mapping[str, Any]) -> bool:
    """Whether the preference stage learns from the data of `reward`, as it names none itself."""
    own = recipe.get("preference") or {}
    return isinstance(own, Mapping) and not own.get("data")


def expand(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's tree with its `algorithm` also in the section that it is about, `rl` or
    `preference`, which fills in the keys.
    """
    name = algorithm_of(recipe)
    if name in RL and recipe.get("rl", {}) is not None:  # a stage set to null stays out
        return {**recipe, "algorithm": name, "rl": _with(name, recipe.get("rl", {}))}
    if name in PREFERENCE:
        own, reward = recipe.get("preference") or {}, _written(recipe, "reward")
        if takes_pairs_of_reward(recipe):
            own = {**own, **{k: reward[k] for k in ("data", "heldout") if k in reward}}
            recipe = {**recipe, "reward": None}
        return {**recipe, "algorithm": name, "preference": _with(name, own), "rl": None}
    return dict(recipe)


def _preset(presets: Mapping[str, dict[str, Any]], section: Mapping[str, Any]) -> dict[str, Any]:
    name = section.get("algorithm")
    return presets.get(name, {}) if isinstance(name, str) else {}


def _written(recipe: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """A section as keys; empty where it is left out, null or an object."""
    tree = recipe.get(section)
    return tree if isinstance(tree, Mapping) else {}


def _with(name: str, section: Any) -> Any:
    if not isinstance(section, Mapping):
        return section
    own = {key: value for key, value in section.items() if key != "algorithm" or value is not None}
    return {"algorithm": name, **own}


def kind_of(section: Any, tag: str) -> str | None:
    """What a section, written or made, says that it is."""
    kind = section.get(tag) if isinstance(section, Mapping) else getattr(section, tag, None)
    return kind if isinstance(kind, str) else None


def _under(preset: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**preset, **own}
    for key, value in preset.items():
        said = _set_keys(own.get(key))
        if not (isinstance(value, Mapping) and isinstance(said, Mapping)):
            continue
        if all(said.get(tag, value.get(tag)) == value.get(tag) for tag in ("name", "kind")):
            merged[key] = _under(value, said)
    return merged


def _set_keys(section: Any) -> Any:
    """The keys that a config was made with, and its kind; what is no config stays as it is."""
    if not hasattr(section, "model_fields_set"):
        return section
    kinds = [tag for tag in ("name", "kind") if hasattr(section, tag)]
    return {key: getattr(section, key) for key in [*kinds, *section.model_fields_set]}
