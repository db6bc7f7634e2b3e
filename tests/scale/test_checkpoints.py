"""Checkpoints of several ranks are complete or not there, and any number of ranks takes them up.
The checks are in `checkpoints.py`.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = ("two", "one", "four", "damaged", "full", "8bit", "8bit of one")


@pytest.fixture(scope="module")
def came_to(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    names = CHECKS if find_spec("torchao") else CHECKS[:5]
    done = subprocess.run(
        [sys.executable, "-m", "tests.scale.checkpoints", tmp_path_factory.mktemp("c"), *names],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    # Users see no warning of torch's, but one of torchao's tensors.
    lines = [line for line in done.stderr.splitlines() if "OptimState8bit" not in line]
    assert done.returncode == 0 and "Warning" not in "".join(lines), done.stderr[-4000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_checkpoints_of_several_ranks(name: str, came_to: dict[str, list[str]]) -> None:
    if name not in came_to:
        pytest.skip("torchao is not installed")
    assert came_to[name] == []
