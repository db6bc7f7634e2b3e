"""Episodes run beside each other: one that waits or hangs holds up nobody."""

import os
import sys
import threading
import time
import weakref
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.engine import Engine
from gearshift.errors import CapacityError, DataError
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec, request_id
from gearshift.rollouts.evaluate import evaluate, starts_of
from gearshift.runtime.worker_threads import WorkerThreads
from gearshift.types import SamplingParams, Trajectory
from tests.gyms import Misbehaves, SayLetters, TwoTurns
from tests.zoo import random_model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model("llama"), tiny_tokenizer())


def test_what_is_sampled_does_not_depend_on_how_long_environments_take(
    engine: Engine,
) -> None:
    class Slow(TwoTurns):
        def step(self, action: str) -> tuple:
            time.sleep(0.001 * (hash(action) % 7))
            return super().step(action)

    ends = []
    for environment in (TwoTurns, Slow):
        collector = Collector(environment, engine.tokenizer, engine.loop)
        with engine.generating():
            ends.append(
                collector.collect(
                    [EpisodeSpec(g, seed=g) for g in range(4)],
                    SamplingParams(n=3, max_new_tokens=12),
                )
            )
    quick, slow = ([(t.group_id, t.token_ids, t.rewards) for t in end] for end in ends)
    assert quick == slow


def test_an_environment_that_hangs_costs_its_own_episode(engine: Engine) -> None:
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

    collector = Collector(Hangs, engine.tokenizer, engine.loop, workers=1, timeout=0.3)
    params = SamplingParams(n=1, max_new_tokens=4)
    for _ in range(2):  # and the next rollout has a thread to run in
        with engine.generating():
            episodes = collector.collect([EpisodeSpec(g, seed=0, row=g) for g in range(4)], params)
        assert [t.group_id for t in episodes] == [0, 2, 3]
    assert collector.failures == 2 and "longer than 0.3 s" in collector.last_failure


def test_a_group_is_told_of_while_others_still_write(engine: Engine) -> None:
    calls: list[tuple[int, int]] = []
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
        calls.append((group[0].group_id, running.count(1)))

    collector = Collector(Ends, engine.tokenizer, engine.loop)
    # Token 40 ends each turn: the second turn of row 1 begins after its first.
    params = SamplingParams(n=1, max_new_tokens=64, stop_token_ids=tuple(range(3, 200)))
    with engine.generating():
        collector.collect([EpisodeSpec(g, seed=0, row=g) for g in range(2)], params, hear)
    assert [group for group, _ in calls] == [0, 1]
    assert calls[0][1] < calls[1][1] == 3


def test_environments_wait_at_the_same_time(engine: Engine) -> None:
    meeting = threading.Barrier(3, timeout=20)

    class Meets(SayLetters):
        def step(self, action: str) -> tuple:
            meeting.wait()  # none of three returns before all are inside
            return super().step(action)

    collector = Collector(Meets, engine.tokenizer, engine.loop, workers=3)
    with engine.generating():
        episodes = collector.collect(
            [EpisodeSpec(0, seed=0)], SamplingParams(n=3, max_new_tokens=4)
        )
    assert len(episodes) == 3 and not collector.failures


def test_a_conversation_that_outgrows_the_model_ends_there(engine: Engine) -> None:
    class Talks(SayLetters):
        def step(self, action: str) -> tuple:
            return "and then? " * 100, 0.5, False, False, {}

    collector = Collector(Talks, engine.tokenizer, engine.loop)
    with engine.generating():
        params = SamplingParams(n=2, max_new_tokens=4, stop_token_ids=tuple(range(3, 259)))
        episodes = collector.collect([EpisodeSpec(0, seed=0)], params)
    assert [t.finish_reason for t in episodes] == ["length"] * 2
    assert all(t.reward == 0.5 for t in episodes) and not collector.failures
    assert engine.loop.idle


def test_rewards_are_asked_for_by_the_conversation_before_the_answer(
    engine: Engine,
) -> None:
    """Where the environment's next words do not fit any more, the episode ends with the answer."""

    class Talks(SayLetters):
        def step(self, action: str) -> tuple:
            said = [{"role": "user", "content": "and then? " * 4}]
            return said[0]["content"], 0.5, False, False, {"messages": [*said, *said]}

    collector = Collector(Talks, engine.tokenizer, engine.loop)
    with engine.generating():
        params = SamplingParams(n=2, max_new_tokens=4, stop_token_ids=tuple(range(3, 259)))
        episodes = collector.collect([EpisodeSpec(0, seed=0)], params)
    for t in episodes:
        *before, answer = t.info.messages
        assert answer == {"role": "assistant", "content": t.info.completion}
        assert before[-1]["role"] == "user" and t.loss_mask[-1] == 1
        assert len(t.token_ids) == len(t.loss_mask) == len(t.logprobs) == len(t.rewards)
        turns = sum(m["role"] == "assistant" for m in t.info.messages)
        assert t.rewarded is not None and len(t.rewarded) == turns > 1
        assert t.reward == 0.5 * turns and all(t.loss_mask[i] for i in t.rewarded)


def test_each_token_names_the_weights_that_sampled_it(engine: Engine) -> None:
    engine.weights_changed()
    collector = Collector(TwoTurns, engine.tokenizer, engine.loop)
    params = SamplingParams(n=2, max_new_tokens=4, stop_token_ids=tuple(range(3, 259)))
    with engine.generating():
        episodes = collector.collect([EpisodeSpec(0, seed=0)], params)
    assert engine.weights_version > 0
    for t in episodes:
        assert t.weights_versions == [engine.weights_version if m else -1 for m in t.loss_mask]


def test_a_prompt_that_leaves_no_place_for_an_answer_costs_its_own_group(
    engine: Engine,
) -> None:
    class Long(SayLetters):
        def _start(self, options: dict[str, Any] | None) -> str:
            word = "long " * 200 if options and options["row"] == 1 else "go"
            self.messages = [{"role": "user", "content": word}]
            return word

    collector = Collector(Long, engine.tokenizer, engine.loop)
    heard: list[int] = []
    with engine.generating():
        starts = [EpisodeSpec(g, seed=0, row=g) for g in range(3)]
        params = SamplingParams(n=2, max_new_tokens=4)
        episodes = collector.collect(starts, params, lambda group: heard.append(len(group)))
    assert [t.group_id for t in episodes] == [0, 0, 2, 2] and sorted(heard) == [0, 2, 2]
    assert (collector.failures, collector.overlong) == (2, 2)
    assert "tokens" in collector.last_failure
    assert engine.loop.idle
    assert list(collector.unusable_rows(3, 400)) == [1]
    assert list(collector.unusable_rows(3, 1)) == [0, 1, 2]


def test_episodes_that_start_otherwise_than_their_group_are_left_out(
    engine: Engine,
) -> None:
    made: list[SayLetters] = []

    class Restless(SayLetters):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            self.restless = len(made) == 1

        def _start(self, options: dict[str, Any] | None) -> str:
            word = "otherwise" if self.restless else "go"
            self.messages = [{"role": "user", "content": word}]
            return word

    collector = Collector(Restless, engine.tokenizer, engine.loop)
    with engine.generating():
        episodes = collector.collect(
            [EpisodeSpec(0, seed=0)], SamplingParams(n=4, max_new_tokens=2)
        )
    assert len(episodes) == 3 and collector.failures == 1 and not collector.overlong
    assert "Restless started differently" in collector.last_failure


@pytest.mark.parametrize("rewarded", ["needed", "finite", "any"])
@pytest.mark.parametrize("reward", [None, float("nan"), 1e30, 0.0])
def test_what_an_environment_must_say(engine: Engine, rewarded: Any, reward: Any) -> None:
    class Says(TwoTurns):
        def step(self, action: str) -> tuple:
            observation, _, *rest = super().step(action)
            return observation, reward, *rest

    collector = Collector(Says, engine.tokenizer, engine.loop)
    params = SamplingParams(n=1, max_new_tokens=4, stop_token_ids=tuple(range(3, 259)))
    with engine.generating():
        episodes = collector.collect([EpisodeSpec(0, seed=0)], params, rewarded=rewarded)
    usable = reward == 0.0
    kept = usable or rewarded == "any" or (reward is None and rewarded == "finite")
    assert len(episodes) == kept and collector.failures == (not kept)
    for t in episodes:
        assert t.rewarded is not None and len(t.rewarded) == (0 if reward is None else 2)
        assert (t.reward == 0.0) == (reward is None or usable)


@given(
    st.tuples(*[st.tuples(st.integers(0, 10**6), st.integers(0, 999), st.integers(0, 9999))] * 2)
)
def test_no_two_completions_of_a_run_share_their_random_numbers(pair: Any) -> None:
    one, other = pair
    assert (request_id(*one) == request_id(*other)) == (one == other)
    assert 0 <= request_id(*one) < 1 << 63
    group, turn, sample = one
    if turn < 256:  # as it was before more turns could be told apart
        assert request_id(*one) == group << 24 | turn << 16 | sample


def test_turn_256_is_no_turn_of_the_next_group() -> None:
    assert request_id(0, 256) != request_id(1, 0) and request_id(7, 300, 3) != request_id(8, 44, 3)
    for beyond in ((1 << 32, 0, 0), (0, 1 << 15, 0), (0, 0, 1 << 16)):
        with pytest.raises(CapacityError, match="can number"):
            request_id(*beyond)


FAULTS = {
    "hang": "longer than 0.5 s",
    "reset hang": "longer than 0.5 s",
    "spin": "longer than 0.5 s",
    "raise": "RuntimeError: the simulator fell over",
    "reset raise": "RuntimeError: the simulator fell over",
    "exit": "SystemExit",
    "short": "not enough values",
    "reset short": "not enough values",
    "number": "its message is 7, which is not text",
    "reset number": "its message is 7, which is not text",
    "nan": "the reward is nan",
    "inf": "the reward is inf",
    "none": "the environment gave no reward",
    "text": "is no number",
    "verdict": "array with more than one element is ambiguous",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_its_own_episode_and_is_no_zero_reward(engine: Engine, fault: str) -> None:
    collector = Collector(partial(Misbehaves, fault), engine.tokenizer, engine.loop, timeout=0.5)
    params = SamplingParams(n=2, max_new_tokens=4)
    for failures in (2, 4):  # nor does what it broke reach the next rollout
        with engine.generating():
            episodes = collector.collect(
                [EpisodeSpec(g, seed=g, row=g % 2) for g in range(4)], params
            )
        assert [t.group_id for t in episodes] == [0, 0, 2, 2]
        assert collector.failures == 2 * failures and FAULTS[fault] in collector.last_failure
    assert engine.loop.idle


def test_a_heldout_evaluation_ends_where_environments_hang(engine: Engine) -> None:
    collector = Collector(partial(Misbehaves, "hang"), engine.tokenizer, engine.loop, timeout=0.3)
    began = time.monotonic()
    with engine.generating():
        result = evaluate(collector, starts_of("validation", 2, range(2)), 4)
        with pytest.raises(DataError, match="it took longer"):
            all_hang = Collector(AllHang, engine.tokenizer, engine.loop, timeout=0.3)
            evaluate(all_hang, starts_of("validation", 40, range(40)), 4)
    assert (result.n, result.episodes, result.failures) == (2, 2, 1)
    assert time.monotonic() - began < 15  # forty hang beside each other, not four after four


class AllHang(Misbehaves):
    def __init__(self) -> None:
        super().__init__("hang")

    def reset(self, **_: Any) -> Any:
        return super().reset(options={"row": 1})


def test_environments_that_wait_do_not_stall_the_others(engine: Engine) -> None:
    meeting = threading.Barrier(6, timeout=20)

    class Meets(SayLetters):
        def step(self, action: str) -> tuple:
            meeting.wait()
            return super().step(action)

    collector = Collector(Meets, engine.tokenizer, engine.loop, workers=1)
    with engine.generating():
        episodes = collector.collect(
            [EpisodeSpec(0, seed=0)], SamplingParams(n=6, max_new_tokens=4)
        )
    assert len(episodes) == 6 and not collector.failures


def test_environments_that_say_nothing_of_messages_are_heard(engine: Engine) -> None:
    class Plain(TwoTurns):
        def reset(self, **given: Any) -> tuple[str, dict[str, Any]]:
            return super().reset(**given)[0], {}

        def step(self, action: str) -> tuple:
            observation, *rest, info = super().step(action)
            said = [{"role": "tool", "content": "42"}, {"role": "user", "content": observation}]
            return observation, *rest, {**info, "messages": said}

    collector = Collector(Plain, engine.tokenizer, engine.loop)
    with engine.generating():
        params = SamplingParams(n=1, max_new_tokens=4, stop_token_ids=tuple(range(3, 259)))
        [episode] = collector.collect([EpisodeSpec(0, seed=0)], params)
    roles = [m["role"] for m in episode.info.messages]
    assert roles == ["user", "assistant", "tool", "user", "assistant"]
    assert "tool\n42" in engine.tokenizer.decode(episode.token_ids)


# Threads


def test_a_process_that_a_call_forks_does_not_go_on_as_the_run() -> None:
    workers, here = WorkerThreads(1), os.getpid()

    def forks() -> int:
        if child := os.fork():
            return os.waitpid(child, 0)[1]
        sys.exit()

    calls = [workers.submit(forks), workers.submit(os.getpid)]
    assert [call.result(timeout=10) for call in calls] == [0, here]
    workers.close()


def test_a_thread_that_was_given_up_ends() -> None:
    workers, before = WorkerThreads(2), threading.active_count()
    done = threading.Event()

    def spin() -> None:
        while True:
            pass

    calls = [workers.submit(spin), workers.submit(done.wait)]
    time.sleep(0.2)
    for call in calls:
        workers.abandon(call)
    assert workers.submit(lambda: 7).result(timeout=10) == 7
    done.set()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_an_environment_that_cannot_be_made_costs_its_episode(engine: Engine) -> None:
    """But the first: then it is a mistake."""
    made: list[int] = []
    wrong = {2, 3}

    def make() -> TwoTurns:
        made.append(1)
        if len(made) in wrong:
            sys.exit("no more")
        return TwoTurns()

    collector = Collector(make, engine.tokenizer, engine.loop)
    for n, left in ((4, 2), (6, 6)):
        params = SamplingParams(n=n, max_new_tokens=4)
        with engine.generating():
            assert len(collector.collect([EpisodeSpec(0, 0)], params)) == left
    assert collector.failures == 2 and collector.last_failure == "SystemExit: no more"
    wrong.add(len(made) + 1)
    with pytest.raises(SystemExit):
        Collector(make, engine.tokenizer, engine.loop).collect([EpisodeSpec(0, 0)], params)


def test_a_thread_that_waits_keeps_nothing_of_what_it_did() -> None:
    workers, thing = WorkerThreads(1), threading.Event()
    workers.submit(thing.set).result(timeout=10)
    kept, deadline = weakref.ref(thing), time.monotonic() + 10
    del thing
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert kept() is None


def test_rows_that_hang_are_left_to_the_rollout(engine: Engine) -> None:
    class Hangs(TwoTurns):
        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            if options["row"] == 1:
                sys.exit("no")
            if options["row"] == 3:
                threading.Event().wait()
            return super().reset(seed=seed, options=options)

    collector = Collector(Hangs, engine.tokenizer, engine.loop, timeout=0.3)
    assert list(collector.unusable_rows(5, most=1)) == [0, 2]


def test_threads_that_were_added_end_with_the_line() -> None:
    workers, before = WorkerThreads(1), threading.active_count()
    meeting = threading.Barrier(5, timeout=20)
    calls = [workers.submit(meeting.wait) for _ in range(5)]
    while not all(call.done() for call in calls):
        time.sleep(0.01)
        workers.maybe_add_thread()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() == before


def test_too_many_hanging_calls_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gearshift.runtime.worker_threads.MAX_HUNG_CALLS", 2)
    workers, never = WorkerThreads(3), threading.Event()
    calls = [workers.submit(never.wait) for _ in range(3)]
    time.sleep(0.2)
    for call in calls[:2]:
        workers.abandon(call)
    with pytest.raises(CapacityError, match=r"3 calls of .*environment\.processes"):
        workers.abandon(calls[2])
    never.set()
