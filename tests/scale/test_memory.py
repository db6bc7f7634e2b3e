"""The memory that is predicted for ranks is what they hold. The checks are in `memory.py`."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_ranks_hold_what_the_plan_says_and_plan_alike(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "tests.scale.memory", str(tmp_path),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    for name in ("replicate", "fsdp", "plan"):
        assert f"{name}: same\n" in done.stdout, done.stdout + done.stderr[-6000:]
