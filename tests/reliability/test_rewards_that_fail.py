"""A run whose rewards and environments raise, hang and die goes to its end and counts what it lost;
what is left is the same to the bit each time.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TINY = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
HERE = "tests.reliability.rewards_that_fail"
LEARNED = ("reward", "kl", "entropy", "loss", "grad_norm", "left_out/no_reward")


def run(folder: Path, *words: str) -> tuple[str, list[dict[str, Any]], bytes]:
    """What it said, its metrics and its weights."""
    command = [
        sys.executable, "-m", "gearshift", "run", TINY, f"run.dir={folder}", "sft=null",
        "reward=null", "rl.steps=4", "rl.rollout.prompts=4", "rl.update.optimizer.lr=1e-3", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = (folder / "rl" / "metrics.jsonl").read_text().splitlines()
    [weights] = (folder / "rl").glob("*.safetensors")
    return done.stdout, [json.loads(line) for line in lines], weights.read_bytes()


def same(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert {k: one.get(k) for k in LEARNED} == {k: other.get(k) for k in LEARNED}


@pytest.mark.slow
def test_rewards_that_fail_cost_their_groups(tmp_path: Path) -> None:
    sources = (
        f"rl.rewards=[{{source: '{HERE}:odd'}}, "
        f"{{source: '{HERE}:dying', weight: 0.5, processes: 1, timeout: 2}}]"
    )
    said, metrics, weights = run(tmp_path / "one", sources)
    assert f"{metrics[-1]['left_out/no_reward']:.0f} without a reward (the last: " in said
    assert 0 < metrics[-1]["left_out/no_reward"] < 32
    assert {f"rewards/{HERE}:{name}/missing" for name in ("odd", "dying")} <= metrics[0].keys()
    _, again, other = run(tmp_path / "two", sources)
    same(metrics, again)
    assert weights == other


@pytest.mark.slow
def test_environments_that_die_cost_their_episodes(tmp_path: Path) -> None:
    words = (
        f'task={{name: gym, id: "{HERE}:Dying-v0", validation: 6, test: 6}}',
        "environment.processes=2", "rl.rollout.timeout=2",
    )  # fmt: skip
    said, metrics, weights = run(tmp_path / "one", *words)
    assert f"{metrics[-1]['environment/failures']:.0f} lost to the environment" in said
    assert 0 < metrics[-1]["environment/failures"] < 32
    _, again, other = run(tmp_path / "two", *words)
    same(metrics, again)
    assert weights == other


@pytest.mark.slow
def test_a_function_that_never_works_ends_the_run_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os\ndef f(**_):\n    os._exit(1)\ndef g(**_):\n    return 1 / 0\n")
    for source, said in (
        (f"{{source: '{file}:f', processes: 1}}", "No episode of the last 16 prompts has a reward"),
        (f"{{source: '{file}:g'}}", "g raised ZeroDivisionError: division by zero"),
    ):
        command = [
            sys.executable, "-m", "gearshift", "run", TINY, f"run.dir={tmp_path}/run{len(source)}",
            "sft=null", "reward=null", "rl.steps=9", "rl.rollout.prompts=4",
            f"rl.rewards=[{source}]",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        lines = [line for line in done.stderr.splitlines() if line.startswith("gearshift: ")]
        assert done.returncode == 1 and len(lines) == 1 and said in lines[0], done.stderr
        assert f"{file}:" in lines[0] and "Traceback" not in done.stderr
