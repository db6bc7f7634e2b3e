"""Runs groups of episodes at the same time, from their starts to the trajectories of those that
ended. It uses a backend that samples completions, and imports no engine and no trainer. One event
loop runs all episodes; environments answer in threads.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, TypeVar

from transformers import PreTrainedTokenizerBase

from gearshift.environments.base import TextEnvironment
from gearshift.errors import DataError
from gearshift.rollouts.ahead import SamplingThread
from gearshift.rollouts.backend import GenerationBackend
from gearshift.rollouts.environment_pool import EnvironmentPool, EpisodeError
from gearshift.rollouts.episode import (
    ChatTokens,
    Episode,
    EpisodeSpec,
    PromptTooLongError,
    Rewarded,
    begin_episode,
    messages_of,
    run_episode,
)
from gearshift.runtime.distributed import world
from gearshift.runtime.event_loop import run_coroutine
from gearshift.runtime.terminal import one_line
from gearshift.types import SamplingParams, Trajectory

T = TypeVar("T")
OnGroup = Callable[[list[Trajectory]], None]
Ended = tuple[TextEnvironment, Trajectory]

WORKERS = 4
"""How many environments answer at the same time, without those that only wait."""
EPISODE_TIMEOUT = 300.0
"""The seconds that an environment has for an answer, unless a recipe sets another number."""


@dataclass
class _Lost:
    """The episodes that a call of `Collector.collect` has lost on one rank."""

    failures: int = 0
    overlong: int = 0
    why: str = ""
    episodes: list[tuple[int, bool, str]] = field(default_factory=list)
    """(group, whether the prompt was too long, the reason) of each."""


class Collector:
    """Runs episodes of one environment, all those of a call at the same time."""

    def __init__(
        self,
        make: Callable[[], TextEnvironment],
        tokenizer: PreTrainedTokenizerBase,
        backend: GenerationBackend,
        workers: int = WORKERS,
        timeout: float | None = EPISODE_TIMEOUT,
    ) -> None:
        """`workers` environments answer at a time, more where those only wait. One that takes more
        than `timeout` seconds loses its episode.
        """
        self.backend, self._chat = backend, ChatTokens(tokenizer)
        self._pool = EnvironmentPool(make, workers, timeout)
        self.failures = 0
        """Episodes lost to an environment that raised, hung, gave no reward that is finite or
        started otherwise than its group; or to a prompt that leaves no place for an answer.
        """
        self.overlong = 0
        """The failures whose prompt was too long."""
        self.last_failure = ""
        self.lost: list[tuple[int, bool, str]] = []
        """(group, whether the prompt was too long, the reason) of each episode that the last call
        of `collect` has lost.
        """
        self._lost = _Lost()
        """What the call that runs now has lost."""
        self._thread: SamplingThread | None = None
        self._begun: dict[tuple[int, ...], Future[tuple[list[Trajectory], _Lost]]] = {}

    def generating(self) -> AbstractContextManager[Any]:
        """The context in which to call `collect`; see `GenerationBackend.generating`."""
        return self.backend.generating()

    def collect(
        self,
        starts: Sequence[EpisodeSpec],
        params: SamplingParams,
        on_group: OnGroup = lambda group: None,
        rewarded: Rewarded = "needed",
    ) -> list[Trajectory]:
        """`params.n` episodes from each start, in order; one whose environment failed is left out
        and counted. `on_group` gets each group as it ends, while others still run.

        Each rank runs the starts of its groups, and its `on_group` gets these; the episodes and
        what was lost come back on all ranks. Episodes that `begin` began with the same starts are
        waited for.
        """
        if self._thread:
            self.begin(starts, params, on_group, rewarded)
        begun = self._begun.pop(_groups(starts), None)
        play = partial(self._play, _own(starts), params, on_group, rewarded)
        parts = world().each(begun.result if begun else lambda: run_coroutine(play()), "episodes")
        for _, lost in parts:
            self.failures += lost.failures
            self.overlong += lost.overlong
        self.last_failure = next((lost.why for _, lost in parts if lost.why), self.last_failure)
        self.lost = sorted(episode for _, lost in parts for episode in lost.episodes)
        order = {start.group_id: i for i, start in enumerate(starts)}
        ended = [trajectory for trajectories, _ in parts for trajectory in trajectories]
        return sorted(ended, key=lambda trajectory: order[trajectory.group_id])

    def has_begun(self, starts: Sequence[EpisodeSpec]) -> bool:
        """Whether `begin` began these episodes and `collect` has not asked for them yet."""
        return _groups(starts) in self._begun

    def begin(
        self,
        starts: Sequence[EpisodeSpec],
        params: SamplingParams,
        on_group: OnGroup = lambda group: None,
        rewarded: Rewarded = "needed",
    ) -> None:
        """Begin the episodes that `collect` is going to ask for with the same arguments, in a
        thread, after those that were begun before. A backend in another process samples meanwhile;
        the engine belongs to the thread that trains.
        """
        self._thread = self._thread or SamplingThread()
        if _groups(starts) not in self._begun:
            play = partial(self._play, _own(starts), params, on_group, rewarded)
            self._begun[_groups(starts)] = self._thread.submit(play)

    async def _play(
        self,
        starts: Sequence[EpisodeSpec],
        params: SamplingParams,
        on_group: OnGroup,
        rewarded: Rewarded,
    ) -> tuple[list[Trajectory], _Lost]:
        """The episodes of these starts, and what was lost of them, on this rank alone."""
        taken = [[self._pool.take() for _ in range(params.n)] for _ in starts]
        one, self._lost = replace(params, n=1), _Lost()
        ended = await self._side_by_side(
            partial(self._run_group, start, environments, one, on_group, rewarded)
            for start, environments in zip(starts, taken, strict=True)
        )
        self._pool.give_back(environment for group in ended for environment, _ in group)
        return [trajectory for group in ended for _, trajectory in group], self._lost

    def unusable_rows(self, rows: int, most: int) -> dict[int, str]:
        """The rows whose prompt has more than `most` tokens or none, or is refused by the chat
        template; and why, for each.

        A prompt that has no more bytes than that is not rendered, if one of its roles has been: a
        token is a byte at least. One that cannot be begun is left to the rollout, which counts it.
        """
        environment = self._pool.make()
        extra: dict[tuple[str, ...], int] = {}
        found: dict[int, str] = {}
        for row in range(rows):
            reset = partial(environment.reset, seed=row, options={"row": row})
            try:
                call = self._pool.call_and_wait(environment, reset)
            except EpisodeError:
                break  # it hangs, and the others may hang equally long
            if call.exception():
                environment = self._pool.make()
                continue
            try:
                observation, info = call.result()
                messages = messages_of(observation, info)
            except Exception:
                continue
            template = info.get("template_options") or {}
            roles = tuple(m["role"] for m in messages)
            size = sum(len(m["content"].encode()) for m in messages)
            plain = not template and all(m.keys() == {"role", "content"} for m in messages)
            if plain and roles in extra and size and size + extra[roles] <= most:
                continue
            try:
                tokens = len(self._chat.prompt(messages, template))
            except DataError as error:
                found[row] = str(error).rstrip(".")
                continue
            if plain:
                extra.setdefault(roles, tokens)  # what the template adds is less than that
            if not 0 < tokens <= most:
                found[row] = (
                    f"the prompt has {tokens} tokens, and 1 to {most} leave place to answer"
                )
        return found

    def close(self) -> None:
        """Close the environments, and end the threads and processes in which they answered."""
        if self._thread:
            self._thread.close()
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    async def _side_by_side(
        self, groups: Iterable[Callable[[], Coroutine[Any, Any, list[Ended]]]]
    ) -> list[list[Ended]]:
        """Run the groups and return their results. The first error ends all of them."""
        watch = asyncio.create_task(self._pool.watch())
        try:
            return await asyncio.gather(*(run() for run in groups))
        finally:
            watch.cancel()

    async def _run_group(
        self,
        start: EpisodeSpec,
        environments: list[TextEnvironment],
        params: SamplingParams,
        on_group: OnGroup,
        rewarded: Rewarded,
    ) -> list[Ended]:
        """Run the episodes of one start; return those that came to their end, with their
        environments.
        """
        begun = await asyncio.gather(
            *(
                self._attempt(
                    partial(begin_episode, environment, start, i, self._chat, rewarded, self._pool),
                    environment,
                    start,
                )
                for i, environment in enumerate(environments)
            )
        )
        episodes = self._alike([episode for episode in begun if episode is not None])
        # All of them ask for their first completion in one tick, so their prompt is computed once.
        trajectories = await asyncio.gather(
            *(
                self._attempt(
                    partial(run_episode, episode, self.backend, params, self._pool),
                    episode.environment,
                    start,
                )
                for episode in episodes
            )
        )
        ended = [
            (episode.environment, trajectory)
            for episode, trajectory in zip(episodes, trajectories, strict=True)
            if trajectory is not None
        ]
        on_group([trajectory for _, trajectory in ended])
        return ended

    def _alike(self, group: list[Episode]) -> list[Episode]:
        """The episodes that start with the prompt that most of them have; the others are lost."""
        if not group:
            return []
        [(prompt, _)] = Counter(tuple(e.token_ids) for e in group).most_common(1)
        for episode in group:
            if tuple(episode.token_ids) != prompt:
                name = type(episode.environment.unwrapped).__name__
                self._lose(
                    episode.environment,
                    episode.spec,
                    f"{name} started differently from the same seed; "
                    "its reset must be a function of seed and options",
                )
        return [episode for episode in group if tuple(episode.token_ids) == prompt]

    async def _attempt(
        self,
        run: Callable[[], Coroutine[Any, Any, T]],
        environment: TextEnvironment,
        start: EpisodeSpec,
    ) -> T | None:
        """The result of `run`; None if the environment's episode fails, which is counted."""
        try:
            return await run()
        except EpisodeError as failure:
            overlong = isinstance(failure, PromptTooLongError)
            self._lose(environment, start, str(failure), overlong)
            return None

    def _lose(
        self, environment: TextEnvironment, start: EpisodeSpec, why: str, overlong: bool = False
    ) -> None:
        self._lost.failures += 1
        self._lost.overlong += overlong
        self._lost.why = why
        self._lost.episodes.append((start.group_id, overlong, one_line(why, 200)))
        self._pool.discard(environment)


def _groups(starts: Sequence[EpisodeSpec]) -> tuple[int, ...]:
    return tuple(start.group_id for start in starts)


def _own(starts: Sequence[EpisodeSpec]) -> list[EpisodeSpec]:
    return [start for start in starts if world().plays(start.group_id)]
