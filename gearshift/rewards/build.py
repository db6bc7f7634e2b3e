"""Makes the function or the reward models that a source of rewards names.

It must not import episodes: `composite` calls what is made here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, cast

from gearshift.errors import ConfigError
from gearshift.models.load import ModelConfig
from gearshift.rewards.config import RewardSource
from gearshift.rewards.functions import RewardFunction
from gearshift.rewards.http import HttpReward
from gearshift.rewards.judge import JudgeReward
from gearshift.rewards.models import Ensemble, ModelReward
from gearshift.rewards.worker_pool import ProcessReward
from gearshift.runtime.user_functions import load_function

DEFAULT_TIMEOUT = 300.0
"""Seconds for one call of a function whose source names no timeout."""


def load_reward(spec: str) -> RewardFunction:
    """The function that `module:function`, `path/to/file.py:function` or `http://...` names.

    Raises `ConfigError` when there is no such file, module or function, or its import fails.
    """
    if spec.startswith(("http://", "https://")):
        return HttpReward(spec)
    return cast(RewardFunction, load_function(spec, "reward"))


def make_function(source: RewardSource) -> RewardFunction:
    """The function of a source that is neither the environment nor a model, in the way that the
    source asks for.
    """
    name = source.source
    if name.startswith("judge:"):
        url = name.removeprefix("judge:")
        return JudgeReward(url, source.judge, source.timeout, key_env=source.key_env)
    if name.startswith(("http://", "https://")):
        return HttpReward(name, source.timeout, key_env=source.key_env)
    if source.timeout or source.processes:  # a thread that hangs cannot always be ended
        return ProcessReward(name, max(1, source.processes), source.timeout or DEFAULT_TIMEOUT)
    return load_reward(name)


ENDS_BY_ITSELF = (ProcessReward, HttpReward, JudgeReward)
"""Functions whose calls end by themselves."""


def call_timeout(function: RewardFunction) -> float:
    """Seconds for one call. The project's own functions limit each thing that they do."""
    if isinstance(function, ENDS_BY_ITSELF):
        return function.timeout
    own = getattr(function, "__module__", "").startswith("gearshift.")
    return math.inf if own else DEFAULT_TIMEOUT


def load_models(
    config: ModelConfig, folders: str, how: Literal["mean", "min", "mean_less_std"]
) -> RewardFunction:
    """The reward model of one folder, or the ensemble of several, separated by commas."""
    members = []
    for folder in map(Path, folders.split(",")):
        if not folder.is_dir():
            raise ConfigError(
                f"rl.rewards: there is no reward model in {folder}; run the reward stage first."
            )
        members.append(ModelReward(config, folder))
    return members[0] if len(members) == 1 else Ensemble(members, how)
