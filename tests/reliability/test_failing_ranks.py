"""A run on two ranks ends in one line, whatever happens to one of them, and leaves nothing half
written.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

LOST = "the same command goes on from what is saved."
MEMORY = "There is not enough memory (DefaultCPUAllocator: can't allocate memory)"
STOPPED = "Stopped after step 2 of 4 (rl); everything is saved, and the same command goes on from"
ENDS: dict[str, tuple[list[int], int, str]] = {
    # the ranks' exit codes, the rank that speaks, what it says
    "data": ([1, 1], 0, "row 3 is odd; correct it."),
    "numbers": ([1, 1], 0, "the loss is not finite."),
    "unexpected": ([70, 70], 0, "Rank 1: Unexpected error: KeyError: 'lost' (the traceback is in "),
    "exit": ([1, 9], 0, "does not run any more; the others waited 0 s for it at episodes"),
    "exit_main": ([9, 1], 1, "does not run any more; the others waited 0 s for it at episodes"),
    "exit_early": ([1, 9], 0, "does not run any more; the others waited 0 s for it at "),
    "killed": ([1, -9], 0, "does not run any more; the others waited 0 s for it at micro-batches"),
    "memory": ([1, 1], 0, f"Rank 1: {MEMORY}"),
    "memory_update": ([1, 1], 0, f"Rank 1: {MEMORY}"),
    "memory_begin": ([1, 1], 0, f"Rank 1: {MEMORY}"),
    "callback": ([70, 70], 0, "Unexpected error: ValueError: mine (the traceback is in "),
    "disk": ([1, 1], 0, "run/rl/metrics.jsonl: No space left on device; free some space."),
    "sleeps": ([1, 143], 0, "the others waited 4 s (scale.timeout) for it at weights"),
    "sleeps_reward": ([1, 143], 0, "the others waited 4 s (scale.timeout) for it at rewards"),
    "term_one": ([143, 143], 0, STOPPED),
    "term_main": ([143, 143], 0, STOPPED),
    "term_all": ([143, 143], 0, STOPPED),
    "between": ([130, 130], 0, STOPPED),
    "twice": ([130, 130], 0, "Stopped in step 2 of 4 (rl); the same command "),
    "twice_one": ([130, 130], 0, "Stopped in step 2 of 4 (rl); the same command "),
    "data_term": ([143, 143], 0, "Stopped at once; the same command goes on from there."),
    "data_term_one": ([143, 143], 0, "Stopped "),
    "load_term": ([143, 143], 0, "Stopped at once; the same command goes on from there."),
    "evaluation_term": ([143, 143], 0, "Stopped while evaluating base on validation; the same "),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each way to fail came to."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.reliability.failing_ranks", tmp_path_factory.mktemp("ways")],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0
    return json.loads(done.stdout)


def lines(end: dict[str, Any], rank: int) -> list[str]:
    return [line for line in end["said"][rank].splitlines() if line.startswith("gearshift: ")]


@pytest.mark.parametrize("way", ENDS)
def test_one_line_says_why(way: str, ends: dict[str, Any]) -> None:
    codes, speaker, words = ENDS[way]
    end = ends[way]
    assert end["codes"] == codes and "Traceback" not in "".join(end["said"])
    (line,) = lines(end, speaker)
    assert words in line and line.startswith("gearshift: rank 1: " if speaker else "gearshift: ")
    hangs = way.startswith("sleeps")
    if not speaker:
        assert end["said"][1] == "" or hangs, "the others are silent"
    assert end["seconds"] < (60 if hangs else 40), "40 s is scale.timeout"
    assert not [name for name in end["checkpoints"] if "tmp" in name]
    assert not end["done"]
    if "the others waited" not in words:
        assert end["notes"] == [], "a rank that ends with the others leaves no note"


@pytest.mark.parametrize("way", ["data", "memory", "callback", "term_one", "term_all", "between"])
def test_finished_steps_are_saved(way: str, ends: dict[str, Any]) -> None:
    assert ends[way]["checkpoints"], ends[way]["said"]


def test_a_hanging_main_rank_is_named_by_another(ends: dict[str, Any]) -> None:
    (line,) = lines(ends["sleeps_main"], 1)
    assert line.startswith("gearshift: rank 1: Rank 0 on ") and LOST in line


def test_a_reward_that_fails_on_one_rank_is_counted(ends: dict[str, Any]) -> None:
    end = ends["reward"]
    assert end["codes"] == [0, 0] and end["done"]
    assert (
        "8 without a reward (the last: The reward function reward.py:fails raised"
        in (end["said"][0])
    )


def test_a_whole_run_leaves_nothing_behind(ends: dict[str, Any]) -> None:
    end = ends["whole"]
    assert (end["codes"], end["done"], end["notes"], end["said"][1]) == ([0, 0], True, [], "")
