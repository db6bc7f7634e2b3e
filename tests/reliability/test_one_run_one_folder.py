"""One process at a time writes into a run's folder; when it dies, the next one goes on."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gearshift.cli.main import main
from gearshift.runtime.folder_lock import lock_run_folder

TINY = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
REWARD = """
import os, time
from pathlib import Path

def wait(prompts, completions, **columns):
    Path(os.environ["STARTED"]).touch()
    while Path(os.environ["HOLD"]).exists():
        time.sleep(0.05)
    return [1.0 for _ in completions]
"""


@pytest.mark.parametrize("command", ["run", "rl"])
def test_a_run_in_a_folder_that_is_in_use_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with lock_run_folder(tmp_path), pytest.raises(SystemExit):
        main([command, TINY, f"run.dir={tmp_path}"])
    said = capsys.readouterr().err
    assert re.fullmatch(rf"gearshift: {tmp_path} is in use by this process since .*\.\n", said)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def gearshift(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gearshift", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_second_is_told_and_a_kill_frees_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards.py").write_text(REWARD)
    started, hold, folder = tmp_path / "started", tmp_path / "hold", tmp_path / "run"
    monkeypatch.setenv("STARTED", str(started))
    monkeypatch.setenv("HOLD", str(hold))
    hold.touch()
    words = [
        TINY, f"run.dir={folder}", "sft=null", "reward=null", "rl.steps=1",
        f"rl.rewards=[{{source: '{tmp_path}/rewards.py:wait'}}]",
    ]  # fmt: skip
    first = gearshift("run", *words)
    while not started.exists():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    who = rf"{folder} is in use by process {first.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d"
    for command in (["run", *words], ["rl", *words], ["eval", str(folder), "--split", "test"]):
        second = gearshift(*command)
        said = second.communicate()[0]
        assert second.returncode == 1 and re.search(who, said), said
        assert "Traceback" not in said
    main(["eval", str(folder)])  # what is recorded may be read
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before
    first.send_signal(signal.SIGKILL)
    first.communicate()
    hold.unlink()
    main(["run", *words])
    assert (folder / "summary.json").exists()
