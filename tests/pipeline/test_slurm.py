"""The batch script for Slurm: it starts torchrun, and a job that is stopped is queued again."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gearshift.cli.main import main

PROGRAMS = {
    "scontrol": 'echo "scontrol $*" >> calls; [ "$1" = show ] && printf "node7\\nnode8\\n"',
    "scancel": 'echo "scancel $*" >> calls; touch stop',
    "srun": 'echo "srun $*" >> calls; touch started\n'
    "for i in $(seq 400); do [ -e stop ] && exit 1; [ -e done ] && exit 0; sleep 0.05; done",
}


@pytest.fixture
def job(tmp_path: Path) -> subprocess.Popen[bytes]:
    """The script as Slurm starts it, with programs in Slurm's place; its step goes on."""
    main(["recipes", "slurm", str(tmp_path)])
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", "slurm.sh", "my.yaml", "rl.steps=3"],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12",
            "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "8",
        },
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        assert job.poll() is None
        time.sleep(0.02)
    return job


def test_the_script_is_listed_and_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    assert "\nslurm" in capsys.readouterr().out
    main(["recipes", "slurm", str(tmp_path / "job.sh")])
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)


def test_a_job_that_is_stopped_is_queued_again(
    tmp_path: Path, job: subprocess.Popen[bytes]
) -> None:
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 1
    first, start, stop, again = (tmp_path / "calls").read_text().splitlines()
    assert first == "scontrol show hostnames node[7-8]"
    assert "torchrun --nnodes=2 --nproc-per-node=8 --rdzv-id=12" in start
    assert "--rdzv-endpoint=node7:29500" in start
    assert start.endswith("-m gearshift run my.yaml rl.steps=3")
    assert (stop, again) == ("scancel --signal=TERM 12", "scontrol requeue 12")


@pytest.mark.parametrize(("file", "code"), [("done", 0), ("stop", 1)])
def test_one_that_ends_by_itself_is_not(
    file: str, code: int, tmp_path: Path, job: subprocess.Popen[bytes]
) -> None:
    (tmp_path / file).touch()
    assert job.wait(30) == code
    assert "requeue" not in (tmp_path / "calls").read_text()
