"""Labels from the page become a reward model, and a policy that learns from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.browser import needs_browser

ROOT = Path(__file__).parents[2]


@needs_browser
@pytest.mark.slow
def test_the_loop_from_labels_to_a_new_policy_closes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.closed_loop", "--small"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"pairs": 8' in done.stdout and "gain of RL over SFT" in done.stdout
