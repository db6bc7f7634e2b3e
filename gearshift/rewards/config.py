"""The config of a reward: where it comes from, how much it counts, and how it is called.

Knows only the text of a recipe; it must not import anything that computes a reward.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gearshift.runtime.config import Config
from gearshift.runtime.urls import checked_variable


class JudgeConfig(Config):
    """The model that marks answers, and the rubric it marks them by, for a source `judge:URL`."""

    model: str = ""
    """The judge's name on its server."""
    rubric: str = "How good, correct and helpful the answer is."
    """What the judge has to judge, in words. `{NAME}` is replaced by the row's column NAME, for
    example a reference answer."""
    low: float = 0.0
    """The worst mark; as a reward it is 0."""
    high: float = 10.0
    """The best mark; as a reward it is 1."""
    samples: int = Field(default=1, ge=1)
    """How many marks the judge gives each answer; the reward is their mean."""
    temperature: float | None = Field(default=0.0, ge=0)
    """The temperature at which the judge samples; with several samples it must be above 0, or they
    are all the same. null leaves it to the server."""
    concurrency: int = Field(default=8, ge=1)
    """How many requests the judge's server gets at the same time."""


def _expand_user(source: str) -> str:
    """The source with `~` in its file or folders replaced by the user's home folder."""
    kind, colon, folders = source.partition(":")
    if kind != "model":
        return os.path.expanduser(source)
    return kind + colon + ",".join(map(os.path.expanduser, folders.split(",")))


class RewardSource(Config):
    """One part of the reward: its source, its weight, and how it is called."""

    source: Annotated[str, AfterValidator(_expand_user)] = "environment"
    """`environment` (the reward that the environment gives); `model` (this run's reward model);
    `model:FOLDER` (another one; `model:FOLDER,FOLDER` is an ensemble); `http://...` (a server that
    scores); `judge:http://.../v1` (a model that marks answers, on a server with OpenAI's API);
    `package.module:function`; `file.py:function`.
    """
    weight: float = 1.0
    """The weight of this source in the sum of rewards; with 0 it is only logged."""
    ensemble: Literal["mean", "min", "mean_less_std"] = "mean"
    """How the scores of several reward models become one. `min` and `mean_less_std` (the mean minus
    the standard deviation) guard against the mistakes of a single model (Coste et al. 2023).
    """
    normalize: bool = False
    """Subtract the mean of all values that this source has given in this run so far, and divide by
    their standard deviation."""
    timeout: float | None = Field(default=None, gt=0)
    """Seconds for one call, which scores one group of completions. After that time the function's
    process is killed (with a timeout, a function always runs in a process) and the group's episodes
    are left out. null means 300 seconds; functions of this project set their own limits. For an
    address: seconds for one request, until the last byte of its answer; a request is tried 3 times
    (4 times with a judge), and null means 60 seconds.
    """
    processes: int = Field(default=0, ge=0)
    """How many processes run the function, each with one group at a time. A process that dies loses
    the episodes of its group and is replaced. With 0 and no timeout the function runs in a thread
    of the training process, which ends if the function crashes.
    """
    judge: JudgeConfig = JudgeConfig()
    """The judge of a source `judge:URL`."""
    key_env: Annotated[str, AfterValidator(checked_variable)] | None = None
    """The environment variable that holds the key of this address; the key is sent as a bearer
    token, to this address only. null reads GEARSHIFT_JUDGE_KEY for `judge:URL` and
    GEARSHIFT_REWARD_KEY for `http://...`, where they are set.
    """

    @model_validator(mode="after")
    def _applies(self) -> Self:
        kind = self.source.split(":")[0]
        if kind in ("environment", "model") and (self.timeout or self.processes):
            raise ValueError(
                f"timeout and processes are only for functions; remove them from `{kind}`."
            )
        if kind == "environment" and self.normalize:
            raise ValueError("normalize is for functions and models; see whiten for advantages.")
        if self.ensemble != "mean" and (kind != "model" or "," not in self.source):
            raise ValueError("ensemble is for several reward models, `model:FOLDER,FOLDER`.")
        if kind in ("http", "https", "judge") and self.processes:
            raise ValueError("processes are only for functions; remove them from this address.")
        if kind not in ("http", "https", "judge") and self.key_env:
            raise ValueError("key_env is only for addresses; remove it from this source.")
        if (kind == "judge") != (self.judge != JudgeConfig()):
            raise ValueError("source judge:URL and judge.model go together; set both or neither.")
        return self
