"""The reward of an episode: a weighted sum of the environment's reward, functions and reward
models.

This file knows episodes; functions are called in threads while other episodes still run.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from gearshift.data.chat import end_token_ids
from gearshift.errors import ConfigError
from gearshift.models.load import ModelConfig
from gearshift.rewards.build import (
    ENDS_BY_ITSELF,
    call_timeout,
    load_models,
    make_function,
)
from gearshift.rewards.config import RewardSource
from gearshift.rewards.functions import (
    REWARD_MISSING,
    NamedReward,
    call_rewards,
    is_usable,
    weighted_sum,
    weighted_sums,
)
from gearshift.rewards.http import HttpReward
from gearshift.rewards.running import RunningMeanStd
from gearshift.runtime.distributed import world
from gearshift.runtime.urls import redact_urls
from gearshift.runtime.worker_threads import WorkerThreads
from gearshift.types import Trajectory

ENVIRONMENT = "environment"
_MAX_TIMEOUTS = 3
"""If this many calls in a row time out, the function is not called for the rest of a rollout: each
call would take as long.
"""
_MAX_FAILURES = 8
"""If a function raises for this many groups in a row and has never worked, the run ends."""
_POLL_SECONDS = 0.05
"""How often a call that has not ended is checked."""


Begun = dict[int, list[Future[list[list[float | None]]]]]
"""The calls of each function for the groups that have ended, by the group's id."""
Call = tuple[int, int, ConfigError | None, bool]
"""What came of a call: the function's number, the group's id, what it raised, and whether it gave a
reward that is not lost."""


class CompositeReward:
    """Scores trajectories. The environment's reward is always one of the parts; its weight is 0 if
    no source names it.

    `missing` describes the last call: for each part's name, the share of the episodes whose reward
    was lost (the function raised, hung or died, no judge answered, or the value was not finite). If
    that part has a weight, such an episode has no total. A part that does not apply to an episode
    (None) is not missing.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        config: ModelConfig,
        reward_model: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`reward_model` is the folder that the source `model` means. `tokenizer` is the policy's:
        reward models with the same tokenizer score the sampled tokens themselves. Raises
        `ConfigError` for an unknown source.
        """
        self._tokenizer = tokenizer
        self._ends = end_token_ids(tokenizer) if tokenizer else frozenset()
        self.environment_weight = sum(s.weight for s in sources if s.source == ENVIRONMENT)
        self.functions: list[NamedReward] = []
        self.models: list[NamedReward] = []
        self.missing: dict[str, float] = {}
        self.last_failure = ""
        """Why a reward was last lost."""
        self._worked: set[str] = set()
        """The functions that have scored a group in this run. If a function raises before that, the
        function is at fault; later, the group is.
        """
        self._begun: Begun = {}
        self._limits: list[float] = []
        """Seconds that a call of each function may take."""
        for s in sources:
            if s.source == ENVIRONMENT:
                continue
            if s.source == "model" or s.source.startswith("model:"):
                named = s.source.removeprefix("model").removeprefix(":") or str(reward_model)
                self.models.append(("model", load_models(config, named, s.ensemble), s.weight))
            else:
                self.functions.append((redact_urls(s.source), make_function(s), s.weight))
                self._limits.append(call_timeout(self.functions[-1][1]))
        # Each function has its own threads, so a slow one delays no other.
        self._workers = [WorkerThreads(getattr(f, "parallel", 1)) for _, f, _ in self.functions]
        self._silent, self._raised = [0] * len(self.functions), [0] * len(self.functions)
        """For each function, how many calls in a row timed out, and how many raised."""
        ordered = [s for s in sources if s.source != ENVIRONMENT]
        # functions first, then models
        ordered.sort(key=lambda s: s.source.split(":")[0] == "model")
        self._running = {i: RunningMeanStd() for i, s in enumerate(ordered) if s.normalize}
        others = [(name, weight) for name, _, weight in (*self.functions, *self.models)]
        self._weights = [(ENVIRONMENT, self.environment_weight), *others]

    def begin(self, group: list[Trajectory]) -> None:
        """Let the functions score a finished group while other episodes still run. Models wait for
        the whole rollout, because they would slow it down.
        """
        if group and self.functions:
            self._begun[group[0].group_id] = [
                workers.submit(partial(self._ask, i, self._told(self.functions[i], group), group))
                for i, workers in enumerate(self._workers)
            ]

    def _ask(self, i: int, named: NamedReward, group: list[Trajectory]) -> list[list[float | None]]:
        """The rewards of function `i` for a group; all missing if it has timed out too often."""
        if self._silent[i] >= _MAX_TIMEOUTS:
            return [[REWARD_MISSING] * len(group)]
        began = time.monotonic()
        [values] = _call([named], group)
        silent = _all_lost(values) and time.monotonic() - began >= self._limits[i]
        self._silent[i] = self._silent[i] + 1 if silent else 0
        return [values]

    def _told(self, named: NamedReward, group: list[Trajectory]) -> NamedReward:
        """Tell a server which answers were cut, because it may run a reward model."""
        name, function, weight = named
        if isinstance(function, HttpReward):
            function = partial(function, ended=self._ended(group))
        return name, function, weight

    def __call__(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[Trajectory | None], dict[str, list[float | None]]]:
        """Each trajectory with its rewards (None where a part is missing), and the rewards of every
        part by its name.

        The environment's rewards stay at their turns, times their weight; all other rewards are
        added at the last token that the policy wrote. Each rank scores its own groups, and gets the
        scores of all.
        """
        self.missing, self.last_failure = {}, ""
        if not trajectories:
            return [], {}
        results = self._shared(trajectories)
        for i, running in self._running.items():
            results[i] = running(results[i])
        results.insert(0, [None if t.rewarded == () else t.reward for t in trajectories])
        totals, parts = weighted_sums(self._weights, results)
        self.missing = {
            name: fmean(v is not None and not is_usable(v) for v in values)
            for name, values in zip(parts, results, strict=True)
        }
        added = zip(trajectories, totals, zip(*results, strict=True), strict=True)
        return [None if sum_ is None else self._with(t, of) for t, sum_, of in added], parts

    def close(self) -> None:
        """End the threads and processes in which functions run."""
        for workers in self._workers:
            workers.close()
        for _, function, _ in self.functions:
            if close := getattr(function, "close", None):
                close()

    def state_dict(self) -> dict[str, Any]:
        """The statistics of normalisation, and which functions have worked."""
        running = {str(i): asdict(running) for i, running in self._running.items()}
        return {"running": running, "worked": sorted(self._worked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._running = {int(i): RunningMeanStd(**kept) for i, kept in state["running"].items()}
        self._worked = set(state["worked"])

    def _shared(self, trajectories: Sequence[Trajectory]) -> list[list[float | None]]:
        """The rewards of functions and models for all trajectories; each rank asks them about its
        own.
        """
        if not (self.functions or self.models):
            return []
        mine = [t for t in trajectories if world().plays(t.group_id)]
        parts = world().each(lambda: (*self._scored(mine), self.last_failure), "rewards")
        self._judge(call for _, calls, _ in parts for call in calls)
        self.last_failure = next((why for _, _, why in parts if why), "")
        of_rank = [[iter(column) for column in columns] for columns, _, _ in parts]
        found = ([next(c) for c in of_rank[t.group_id % world().size]] for t in trajectories)
        return [list(column) for column in zip(*found, strict=True)]

    def _judge(self, calls: Iterable[Call]) -> None:
        """Learn from the calls of all ranks which functions work. Raises the `ConfigError` of one
        that has raised for each of the first `_MAX_FAILURES` groups.
        """
        for i, _, error, worked in sorted(calls, key=lambda call: call[:2]):
            name = self.functions[i][0]
            self._raised[i] = 0 if worked else self._raised[i] + (error is not None)
            if worked:
                self._worked.add(name)
            if error and self._raised[i] >= _MAX_FAILURES and name not in self._worked:
                raise error

    def _scored(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[list[float | None]], list[Call]]:
        if not trajectories:
            return [[] for _ in (*self.functions, *self.models)], []
        results, calls = self._of_functions(trajectories)
        return results + (self._of_models(trajectories) if self.models else []), calls

    def _of_functions(
        self, trajectories: Sequence[Trajectory]
    ) -> tuple[list[list[float | None]], list[Call]]:
        calls: list[Call] = []
        if not self.functions:
            return [], calls
        groups = [list(group) for _, group in groupby(trajectories, key=lambda t: t.group_id)]
        for group in groups:
            if group[0].group_id not in self._begun:
                self.begin(group)
        # What was begun for a later step stays.
        begun = {g[0].group_id: self._begun.pop(g[0].group_id) for g in groups}
        results = [self._result(i, begun, groups, calls) for i in range(len(self.functions))]
        self._silent = [0] * len(self.functions)
        return results, calls

    def _result(
        self, i: int, begun: Begun, groups: Sequence[Sequence[Trajectory]], calls: list[Call]
    ) -> list[float | None]:
        """The rewards of function `i` for these groups; those of a group are missing if the
        function raised, or has not answered in time. What came of each call is added to `calls`.
        """
        name, function, weight = self.functions[i]
        results: list[float | None] = []
        for group in groups:
            group_id = group[0].group_id
            call_ = begun[group_id][i]
            values: list[float | None] = [REWARD_MISSING] * len(group)
            why, raised = "", None
            try:
                if self._in_time(i, call_):
                    [values] = call_.result()
                    why = getattr(function, "last_failure", "")
                else:
                    why = f"the reward function {name} took more than {self._limits[i]:g} s"
            except ConfigError as error:
                raised, why = error, str(error).rstrip(".")
            calls.append((i, group_id, raised, not _all_lost(values)))
            if weight and not all(v is None or is_usable(v) for v in values):
                known = self._silent[i] >= _MAX_TIMEOUTS and self.last_failure
                self.last_failure = (
                    why or known or f"the reward function {name} gave no finite number"
                )
            results += values
        return results

    def _in_time(self, i: int, call_: Future[Any]) -> bool:
        """Wait for a call of function `i`; returns False if it was abandoned. A call in a process
        or to a server ends by itself.
        """
        workers, limit = self._workers[i], self._limits[i]
        ends = isinstance(self.functions[i][1], ENDS_BY_ITSELF)
        while not wait([call_], timeout=_POLL_SECONDS).done:
            if not ends and workers.seconds(call_) > limit:
                self._silent[i] += 1  # before the next queued call begins
                workers.abandon(call_)
                return call_.done()
        return True

    def _with(self, trajectory: Trajectory, values: Sequence[float | None]) -> Trajectory:
        """The trajectory with the sum of its parts; the first part is the environment's."""
        own, weights = self.environment_weight, [weight for _, weight in self._weights]
        rewards = [r * own if own else 0.0 for r in trajectory.rewards]
        last = _last_written(trajectory)
        extra = weighted_sum(weights[1:], values[1:])
        given = trajectory.rewarded if own else ()
        if extra is not None and any(weights[1:]):
            rewards[last] += extra
            given = None if given is None else (*(i for i in given if i != last), last)
        return replace(trajectory, rewards=rewards, rewarded=given)

    def _of_models(self, trajectories: Sequence[Trajectory]) -> list[list[float | None]]:
        """The reward models' scores of these episodes, from the tokens up to the last one that the
        policy wrote.
        """
        read = [t.token_ids[: _last_written(t) + 1] for t in trajectories]
        models = self.models
        if self._tokenizer is not None:
            given: dict[str, Any] = {"token_ids": read, "policy": self._tokenizer}
            given["ended"] = self._ended(trajectories)
            models = [(name, partial(model, **given), weight) for name, model, weight in models]
        results = _call(models, trajectories)
        for values in results:
            lost = [len(ids) for ids, v in zip(read, values, strict=True) if v and not is_usable(v)]
            if lost:
                self.last_failure = (
                    f"a reward model could not score an episode of {max(lost)} tokens: it "
                    "accepts fewer, or its score was not finite"
                )
        return results

    def _ended(self, trajectories: Sequence[Trajectory]) -> list[bool]:
        """Whether the last answer of each episode came to its end; otherwise it was cut."""
        return [
            t.finish_reason == "stop" or t.token_ids[_last_written(t)] in self._ends
            for t in trajectories
        ]


def _all_lost(values: Sequence[float | None]) -> bool:
    return not any(v is None or is_usable(v) for v in values)


def _last_written(trajectory: Trajectory) -> int:
    """The position of the last token that the policy wrote."""
    last = max(i for i, mask in enumerate(trajectory.loss_mask) if mask)
    return last


def _call(
    functions: Sequence[NamedReward], trajectories: Sequence[Trajectory]
) -> list[list[float | None]]:
    """The rewards of each function for these episodes."""
    names = {name for t in trajectories for name in t.info.columns}
    return call_rewards(
        functions,
        [t.info.messages[:-1] for t in trajectories],
        [t.info.completion for t in trajectories],
        [t.token_ids[t.prompt_length :] for t in trajectories],
        {name: [t.info.columns.get(name) for t in trajectories] for name in sorted(names)},
    )
