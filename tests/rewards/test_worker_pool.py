"""A reward function in its own process: what it hangs or dies on costs its group, and no more."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import ConfigError
from gearshift.models.load import ModelConfig
from gearshift.rewards.composite import CompositeReward
from gearshift.rewards.config import RewardSource
from gearshift.rewards.functions import combine_rewards
from gearshift.rewards.worker_pool import ProcessReward
from gearshift.runtime.user_functions import given_functions
from gearshift.types import EpisodeInfo, Trajectory

FUNCTION = """
import asyncio, ctypes, os, signal, threading, time

def f(prompts, completions, gold, **_):
    word = completions[0]
    if word == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if word in ("hang", "stubborn"):
        while True: time.sleep(1)
    if word == "late":
        raise TimeoutError("mine")
    if word == "crash":
        ctypes.string_at(0)
    if word == "exit":
        os._exit(0)
    if word == "raise":
        raise KeyError("no such thing")
    if word == "fork" and (child := os.fork()):
        os.waitpid(child, 0)
    if word == "odd":
        return [object()]
    if word == "main":
        return [threading.current_thread() is threading.main_thread()]
    return [len(c) + g for c, g in zip(completions, gold)]

async def later(completions, **_):
    await asyncio.sleep(0.001)
    return [None if c == "none" else os.getpid() for c in completions]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(FUNCTION)
    return str(path)


@pytest.fixture(scope="module")
def reward(file: str) -> Iterator[ProcessReward]:
    reward = ProcessReward(f"{file}:f", processes=1, timeout=1.0)
    assert score(reward, "") == [0.5]  # the worker's start does not count
    yield reward
    reward.close()


def score(reward: Any, *words: str) -> Any:
    columns: dict[str, Any] = {"gold": [0.5] * len(words)}
    return combine_rewards([("f", reward, 1.0)], [[]] * len(words), list(words), None, columns)[0]


@pytest.mark.parametrize(
    ("word", "said"), [("stubborn", "took more than 1 s"), ("crash", "died"), ("exit", "")]
)
def test_a_call_that_hangs_or_dies_loses_its_own_samples(
    reward: ProcessReward, word: str, said: str
) -> None:
    begun = time.monotonic()
    assert score(reward, word, "a") == [None, None]
    assert time.monotonic() - begun < 20
    assert reward.spec in reward.last_failure and said in reward.last_failure
    assert score(reward, "abc", "a") == [3.5, 1.5]  # another worker has taken its place


def test_a_process_that_a_function_forks_does_not_answer_for_it(reward: ProcessReward) -> None:
    assert score(reward, "fork") == [4.5] and score(reward, "a", "abc") == [1.5, 3.5]


@pytest.mark.parametrize(
    ("word", "said"),
    [("raise", "f raised KeyError"), ("late", "raised TimeoutError: mine"), ("odd", "a number or")],
)
def test_what_raises_is_told_as_in_a_thread(reward: ProcessReward, word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        score(reward, word)
    assert str(caught.value).count("reward function") == 1


def test_a_wrong_name_is_told_before_any_worker_starts(file: str) -> None:
    with pytest.raises(ConfigError, match="no function `g`"):
        ProcessReward(f"{file}:g", 1, 300.0)


def episode(group: int, text: str) -> Trajectory:
    info = EpisodeInfo([{"role": "user", "content": "q"}, {}], text, columns={"gold": 0.0})
    return Trajectory([5, 6], [0, 1], [0.0] * 2, [0, 1.0], group, 1, "stop", info)


def test_the_lost_are_left_out_and_counted_and_the_rest_run_side_by_side(
    file: str, tmp_path: Path
) -> None:
    """With another source beside it: a lost part is no zero in the sum."""
    sources = [
        RewardSource(source="environment"),
        RewardSource(source=f"{file}:later", weight=0.0),
        RewardSource(source=f"{file}:f", timeout=1.0, processes=2),
    ]
    total = CompositeReward(
        sources, ModelConfig(name="tiny", dtype="float32", device="cpu"), tmp_path
    )
    try:
        episodes = [episode(0, "aa"), episode(1, "hang"), episode(1, "b"), episode(2, "none")]
        for group in (episodes[:1], episodes[1:3]):
            total.begin(group)
        rewarded, parts = total(episodes)
        assert [t and t.reward for t in rewarded] == [3.0, None, None, 5.0]
        assert parts[f"{file}:f"] == [2.0, None, None, 4.0]
        missing = {"environment": 0.0, f"{file}:later": 0.0, f"{file}:f": 0.5}
        assert total.missing == missing
        assert parts[f"{file}:later"][3] is None  # does not apply: left out, and not missing
    finally:
        total.functions[1][1].close()  # type: ignore[attr-defined]


def test_a_timeout_takes_a_process() -> None:
    wanted = RewardSource(source="gearshift.tasks.voice.commands:voice_reward", timeout=1.0)
    model = ModelConfig(name="tiny", dtype="float32", device="cpu")
    [(_, function, _)] = CompositeReward([wanted], model, Path()).functions
    assert isinstance(function, ProcessReward) and function.parallel == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"source": "environment", "timeout": 1.0},
        {"source": "environment", "normalize": True},
        {"source": "model:a", "processes": 1},
        {"source": "http://127.0.0.1/score", "processes": 1},
        {"source": "judge:http://127.0.0.1/v1"},
        {"source": "a:f", "judge": {"model": "m"}},
        {"source": "a:f", "timeout": 0},
    ],
)
def test_keys_that_do_not_apply_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"go together|for functions|greater than 0"):
        RewardSource(**keys)


def test_a_worker_that_hangs_does_not_hold_up_the_end(file: str) -> None:
    """The process that started the worker ends, and no process is left."""
    script = (
        "import sys, threading, time\n"
        "from gearshift.rewards.worker_pool import ProcessReward\n"
        "if __name__ == '__main__':\n"
        f"    r = ProcessReward({file + ':f'!r}, 1, 300.0)\n"
        "    r([[]], ['a'], gold=[0])\n"
        "    threading.Thread(target=r, args=([[]], ['hang']), kwargs={'gold': [0]},"
        " daemon=True).start()\n"
        "    time.sleep(0.5)\n"
    )
    path = Path(file).with_name("script.py")
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(path) not in left


def test_a_function_without_a_module_has_no_process() -> None:
    with (
        given_functions({"given:mine": lambda completions, **_: [1.0] * len(completions)}),
        pytest.raises(ConfigError, match=r"`given:mine` has no module .* name it module:name"),
    ):
        ProcessReward("given:mine", 1, 1.0)


SIGNALLED = """
import os, signal, threading, time
from gearshift.rewards.worker_pool import ProcessReward

def disturb():
    for number in numbers * 4:
        os.killpg(0, number)
        time.sleep(0.4)

if __name__ == "__main__":
    os.setpgrp()
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    for number in numbers:
        signal.signal(number, lambda *_: None)  # the run finishes its step first
    reward = ProcessReward({spec!r}, processes=1, timeout=60.0)
    thread = threading.Thread(target=disturb)
    thread.start()  # while the worker starts
    early = reward([[]], ["abc"], gold=[0.5])
    os.killpg(0, signal.SIGTERM)  # while it waits for its next call
    print(early, reward([[]], ["a"], gold=[0.5]), reward.last_failure)
    thread.join()
    reward.close()
"""


def test_signals_to_the_process_group_reach_the_run_alone(file: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SIGNALLED.replace("{spec!r}", repr(f"{file}:f")))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "[3.5] [1.5] \n" and not done.stderr, done.stderr
