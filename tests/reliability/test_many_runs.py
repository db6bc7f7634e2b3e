"""Runs in one process leave nothing behind: no threads, processes, open files or settings."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from gearshift.errors import GearshiftError
from gearshift.pipeline.recipe import Recipe
from gearshift.pipeline.run import Run
from gearshift.runtime.config import load

TINY = Path("tests/smoke/tiny.yaml")
REWARD = """
def length(prompts, completions, **columns):
    return [float(len(c)) for c in completions]
"""


def held() -> tuple[int, int, int]:
    """Threads, open files and child processes of this process."""
    children = [p.read_text().split() for p in Path("/proc/self/task").glob("*/children")]
    return threading.active_count(), len(os.listdir("/proc/self/fd")), sum(map(len, children))


def left(before: tuple[int, int, int]) -> tuple[int, int, int]:
    """What is held once threads and processes that should end have ended."""
    deadline = time.monotonic() + 30
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    return held()


def resident() -> int:
    """Bytes of memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(folder: Path, *changes: str) -> None:
    """Reinforcement learning with an environment, a function and a function's process."""
    reward = folder.parent / "reward.py"
    reward.write_text(REWARD)
    sources = f'[{{source: environment}}, {{source: "{reward}:length", weight: 0.1, processes: 1}}]'
    recipe = load(
        Recipe,
        TINY,
        [
            f"run.dir={folder}", "sft=null", "reward=null", "eval.limit=2", "rl.steps=1",
            f"rl.rewards={sources}", *changes,
        ],
    )  # fmt: skip
    Run(recipe, echo=lambda text: None).execute()


def test_a_run_leaves_nothing_open(tmp_path: Path) -> None:
    run(tmp_path / "first")  # what is made once for a process
    before = held()
    run(tmp_path / "second")
    assert left(before) == before


@pytest.mark.slow
def test_environments_in_processes_leave_nothing_either(tmp_path: Path) -> None:
    run(tmp_path / "first")
    before = held()
    run(tmp_path / "second", "environment.processes=1")
    assert left(before) == before


def test_a_run_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    run(tmp_path / "first")
    before = held()
    (tmp_path / "bad.py").write_text("def fails(prompts, completions, **columns): raise KeyError\n")
    fails = f'rl.rewards=[{{source: "{tmp_path / "bad.py"}:fails", processes: 1}}]'
    with pytest.raises(GearshiftError):
        run(tmp_path / "failing", fails)
    assert left(before) == before


def test_a_run_leaves_torch_as_it_was(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    run(tmp_path / "run", "model.threads=1")
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.slow
def test_fifty_runs_in_one_process_stay_flat(tmp_path: Path) -> None:
    for nth in range(5):
        run(tmp_path / f"{nth}")
    gc.collect()
    before, memory = held(), resident()
    for nth in range(5, 50):
        run(tmp_path / f"{nth}")
    gc.collect()
    assert left(before) == before
    assert resident() - memory < 64 << 20
