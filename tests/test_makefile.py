"""`make setup` takes a build of PyTorch with CUDA where there is a GPU, and only there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("status", "without_cpu"), [(0, True), (9, False)])
def test_setup_takes_cuda_where_a_card_works(
    status: int, without_cpu: bool, tmp_path: Path
) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho GPU 0: a card\nexit {status}\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "-n", "-B", "setup"],
        cwd=ROOT, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    [wanted] = re.findall(r"--constraint constraints.txt '?(torch[^\s']*)", done.stdout)
    [version] = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert wanted == (f"torch!={version}+cpu" if without_cpu else "torch")
