"""An environment in a process of its own dies alone, and says the same as in a thread."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gearshift.engine import Engine
from gearshift.environments.worker_processes import (
    EnvironmentProcesses,
    ProcessEnvironment,
    ProcessError,
)
from gearshift.models.tiny import tiny_tokenizer
from gearshift.rollouts.collector import Collector
from gearshift.rollouts.episode import EpisodeSpec
from gearshift.types import SamplingParams
from tests.environments.dies import Dies
from tests.zoo import random_model


@pytest.fixture(scope="module")
def refuses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("separate") / "refuses"


@pytest.fixture(scope="module")
def separate(refuses: Path) -> Iterator[EnvironmentProcesses]:
    made = EnvironmentProcesses(Dies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFUSES", str(refuses))
        made().reset()
    yield made
    made.close()


def pid_of(environment: ProcessEnvironment) -> int:
    environment.reset(seed=1)
    return environment._pid


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


def test_a_process_that_an_environment_forks_does_not_answer_for_it(
    separate: EnvironmentProcesses,
) -> None:
    one = separate()
    one.reset(options={"row": 7})
    assert one.step("a")[1] == 0.25 and one.step("b")[1] == 1.0


def test_each_keeps_its_state_and_its_process_between_calls(separate: EnvironmentProcesses) -> None:
    one, other = separate(), separate()
    first = pid_of(one), pid_of(other)
    assert len({os.getpid(), *first}) == 3
    assert one.step("a")[1] == 0.25 and one.step("b")[1] == 1.0 and other.step("a")[1] == 0.25
    assert pid_of(one) == first[0]
    one.close()
    assert gone(first[0]) and other.step("b")[1] == 1.0


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (1, "its process died"),
        (2, "its process died"),
        (3, "SystemExit: no"),
        (5, "PicklingError|AttributeError"),
        (6, "KeyboardInterrupt"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_reset_works(
    separate: EnvironmentProcesses, row: int, said: str
) -> None:
    environment = separate()
    environment.reset(options={"row": row})
    with pytest.raises(ProcessError, match=said):
        environment.step("a")
    assert environment.reset(options={"row": 0})[1]["row"] == 0
    assert environment.step("a")[1] == 0.25


def test_one_that_died_while_it_was_idle_costs_nothing(separate: EnvironmentProcesses) -> None:
    environment = separate()
    first = pid_of(environment)
    environment.kill()
    assert gone(first)
    assert pid_of(environment) != first


def test_one_that_cannot_be_made_says_so(separate: EnvironmentProcesses, refuses: Path) -> None:
    refuses.touch()
    with pytest.raises(ProcessError, match="ImportError: it needs what is not here"):
        separate().reset()
    refuses.unlink()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model("llama"), tiny_tokenizer())


def test_the_process_of_an_episode_that_was_lost_ends(
    engine: Engine, separate: EnvironmentProcesses
) -> None:
    pids: list[int] = []

    class Noted(ProcessEnvironment):
        def step(self, action: str) -> Any:
            pids.append(self._pid)
            return super().step(action)

    collector = Collector(partial(Noted, separate.connect), engine.tokenizer, engine.loop)
    with engine.generating():
        assert collector.collect([EpisodeSpec(0, 0, 3)], SamplingParams(max_new_tokens=4)) == []
    assert gone(pids[0])
    collector.close()


def test_deaths_and_hangs_cost_their_own_episodes_and_the_rest_are_those_of_threads(
    engine: Engine, separate: EnvironmentProcesses
) -> None:
    found = []
    for make, rows in ((Dies, [0]), (separate, range(7))):
        collector = Collector(make, engine.tokenizer, engine.loop, timeout=1.0)
        starts = [EpisodeSpec(row, seed=row, row=row) for row in rows]
        with engine.generating():
            episodes = collector.collect(starts, SamplingParams(n=2, max_new_tokens=4))
        # Their last bits depend on which prompts are computed together.
        found.append([replace(t, logprobs=[]) for t in episodes])
        assert collector.failures == 2 * (len(rows) - 1)
    assert len(found[0]) == 2 and found[0] == found[1]


SCRIPT = """
import os, sys, threading, time
from functools import partial
from gearshift.environments.worker_processes import EnvironmentProcesses
from tests.environments.dies import Dies
if __name__ == "__main__":
    made = EnvironmentProcesses(Dies)
    idle, hung = made(), made()
    idle.reset()
    hung.reset(options={"row": 4})
    threading.Thread(target=partial(hung.step, "a"), daemon=True).start()
    time.sleep(0.5)
    print(made._forks.pid, idle._pid, hung._pid, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends what hangs with its parent")
@pytest.mark.parametrize("how", ["ends", "killed"])
def test_none_is_left_when_the_run_is_gone(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), how], capture_output=True, text=True, timeout=100
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3, done.stderr
    assert all(gone(pid) for pid in pids)
