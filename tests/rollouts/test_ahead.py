"""Episodes that are begun ahead are those that would have been played later."""

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest

from gearshift.errors import ConfigError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.types import Completion, SamplingParams, Trajectory
from tests.gyms import SayLetters, TwoTurns


class Elsewhere:
    """A backend that another program could be: it answers after a while, from any thread."""

    exact = False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.threads, self.requests = seconds, set[int](), list[int]()

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, request_id: int, sample: int = 0
    ) -> Completion:
        self.threads.add(threading.get_ident())
        self.requests.append(request_id)
        await asyncio.sleep(self.seconds)
        ids = [3 + (request_id + i) % 50 for i in range(4)]
        return Completion(ids, [-1.0] * 4, [-1.0] * 4, "length", [0] * 4)

    async def update_weights(self, weights: Any, version: int) -> None: ...

    def generating(self) -> nullcontext[None]:
        return nullcontext()

    def stats(self) -> dict[str, float]:
        return {}


PARAMS = SamplingParams(n=2, max_new_tokens=4)
STEPS = [[EpisodeSpec(g, seed=g) for g in range(3 * step, 3 * step + 3)] for step in range(4)]


def told(trajectories: list[Trajectory]) -> list[Any]:
    return [(t.group_id, t.token_ids, t.rewards) for t in trajectories]


def test_they_are_the_same_episodes_in_another_thread() -> None:
    plain = Collector(TwoTurns, tiny_tokenizer(), Elsewhere())
    wanted = [told(plain.collect(starts, PARAMS)) for starts in STEPS]
    backend, groups = Elsewhere(0.01), list[int]()
    with Collector(TwoTurns, tiny_tokenizer(), backend) as ahead:
        for starts in STEPS[:3]:
            ahead.begin(starts, PARAMS, lambda group: groups.append(group[0].group_id))
        assert [told(ahead.collect(starts, PARAMS)) for starts in STEPS] == wanted
    assert threading.get_ident() not in backend.threads
    # One step after the other, so that no episode is older than its step allows.
    assert [g // 3 for g in groups] == sorted(g // 3 for g in groups) and len(groups) == 9


def test_what_was_lost_counts_for_the_step_that_lost_it() -> None:
    class Fails(SayLetters):
        def reset(self, *, seed: int | None = None, **options: Any) -> Any:
            if seed in (4, 9, 10):
                raise ValueError("this one fails")
            return super().reset(seed=seed, **options)

    def failures(begun: int) -> list[int]:
        found = []
        with Collector(Fails, tiny_tokenizer(), Elsewhere()) as collector:
            for starts in STEPS[:begun]:
                collector.begin(starts, PARAMS)
            time.sleep(0.2 if begun else 0)
            for starts in STEPS:
                before = collector.failures
                collector.collect(starts, PARAMS)
                found.append(collector.failures - before)
        return found

    assert failures(3) == failures(0) == [0, 2, 0, 4]


def test_an_error_is_raised_where_its_episodes_are_asked_for() -> None:
    class Broken(Elsewhere):
        async def generate(self, *args: Any, **kwargs: Any) -> Completion:
            if len(self.requests) >= 13:
                raise ConfigError("The server is gone.")
            return await super().generate(*args, **kwargs)

    with Collector(TwoTurns, tiny_tokenizer(), Broken()) as collector:
        for starts in STEPS[:3]:
            collector.begin(starts, PARAMS)
        assert len(collector.collect(STEPS[0], PARAMS)) == 6
        with pytest.raises(ConfigError, match="gone"):
            for starts in STEPS[1:3]:
                collector.collect(starts, PARAMS)


def test_closing_waits_for_no_episode_that_nobody_wants() -> None:
    collector = Collector(TwoTurns, tiny_tokenizer(), Elsewhere(3600.0))
    for starts in STEPS:
        collector.begin(starts, PARAMS)
    time.sleep(0.1)
    thread = next(t for t in threading.enumerate() if t.name == "sampling")
    collector.close()
    assert not thread.is_alive()
