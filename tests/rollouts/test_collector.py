"""Episodes run beside each other: one that waits or hangs holds up nobody."""

import threading
import time
from typing import Any

import pytest

from gearshift.engine import HybridEngine
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector, Start
from gearshift.types import SamplingParams, Trajectory
from tests.gyms import SayLetters, TwoTurns
from tests.zoo import random_model


@pytest.fixture(scope="module")
def engine() -> HybridEngine:
    return HybridEngine(random_model("llama"), tiny_tokenizer())


def test_what_is_sampled_does_not_depend_on_how_long_environments_take(
    engine: HybridEngine,
) -> None:
    class Slow(TwoTurns):
        def step(self, action: str) -> tuple:
            time.sleep(0.001 * (hash(action) % 7))
            return super().step(action)

    ends = []
    for environment in (TwoTurns, Slow):
        collector = Collector(environment, engine.tokenizer, engine)
        with engine.generating():
            ends.append(
                collector.collect(
                    [Start(g, seed=g) for g in range(4)], SamplingParams(n=3, max_new_tokens=12)
                )
            )
    quick, slow = ([(t.group_id, t.token_ids, t.rewards) for t in end] for end in ends)
    assert quick == slow


def test_an_environment_that_hangs_costs_its_own_episode(engine: HybridEngine) -> None:
    never = threading.Event()

    class Hangs(SayLetters):
        def step(self, action: str) -> tuple:
            if self.messages[0]["content"].endswith("hang"):
                never.wait()
            return super().step(action)

        def _start(self, options: dict[str, Any] | None) -> str:
            word = "hang" if options and options["row"] == 1 else "go"
            self.messages = [{"role": "user", "content": word}]
            return word

    collector = Collector(Hangs, engine.tokenizer, engine, workers=1, timeout=0.3)
    params = SamplingParams(n=1, max_new_tokens=4)
    for _ in range(2):  # and the next rollout has a thread to run in
        with engine.generating():
            episodes = collector.collect([Start(g, seed=0, row=g) for g in range(4)], params)
        assert [t.group_id for t in episodes] == [0, 2, 3]
    assert collector.failures == 2 and "longer than 0.3 s" in collector.last_failure


def test_a_group_is_told_of_while_others_still_write(engine: HybridEngine) -> None:
    told: list[tuple[int, int]] = []
    running: list[int] = []

    class Ends(SayLetters):
        def step(self, action: str) -> tuple:
            row = int(self.messages[0]["content"])
            running.append(row)
            if row == 0 or running.count(1) == 3:
                return "", 1.0, True, False, {}
            return "again", 0.0, False, False, {}

        def _start(self, options: dict[str, Any] | None) -> str:
            self.messages = [{"role": "user", "content": str(options["row"])}]  # type: ignore[index]
            return self.messages[0]["content"]

    def hear(group: list[Trajectory]) -> None:
        told.append((group[0].group_id, running.count(1)))

    collector = Collector(Ends, engine.tokenizer, engine)
    # Token 40 ends each turn: the second turn of row 1 begins after its first.
    params = SamplingParams(n=1, max_new_tokens=64, stop_token_ids=tuple(range(3, 200)))
    with engine.generating():
        collector.collect([Start(g, seed=0, row=g) for g in range(2)], params, hear)
    assert [group for group, _ in told] == [0, 1]
    assert told[0][1] < told[1][1] == 3


def test_environments_wait_at_the_same_time(engine: HybridEngine) -> None:
    meeting = threading.Barrier(3, timeout=20)

    class Meets(SayLetters):
        def step(self, action: str) -> tuple:
            meeting.wait()  # none of three returns before all are inside
            return super().step(action)

    collector = Collector(Meets, engine.tokenizer, engine, workers=3)
    with engine.generating():
        episodes = collector.collect([Start(0, seed=0)], SamplingParams(n=3, max_new_tokens=4))
    assert len(episodes) == 3 and not collector.failures


def test_a_conversation_that_outgrows_the_model_ends_there(engine: HybridEngine) -> None:
    class Talks(SayLetters):
        def step(self, action: str) -> tuple:
            return "and then? " * 100, 0.5, False, False, {}

    collector = Collector(Talks, engine.tokenizer, engine)
    with engine.generating():
        params = SamplingParams(n=2, max_new_tokens=4, stop_token_ids=tuple(range(3, 259)))
        episodes = collector.collect([Start(0, seed=0)], params)
    assert [t.finish_reason for t in episodes] == ["length"] * 2
    assert all(t.reward == 0.5 for t in episodes) and not collector.failures
    assert engine._scheduler is not None and engine._scheduler.idle
