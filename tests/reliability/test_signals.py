"""A signal at any moment ends a run with its number and one line, and the same command ends with
the bits of the run that was not asked.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gearshift.pipeline.context
import gearshift.pipeline.heldout
import gearshift.pipeline.stage_data
import gearshift.pipeline.stages
import gearshift.pipeline.summary
import gearshift.trainers.reward_model
from gearshift.cli.main import main
from gearshift.pipeline.task_data import TaskData
from gearshift.runtime import checkpoint
from gearshift.runtime.optimizer import MasterAdamW
from gearshift.trainers.stage import Stage
from tests.chaos.runs import fingerprint

RECIPE = str(Path(__file__).parents[1] / "smoke" / "tiny.yaml")
WORDS = ["run", RECIPE, "eval.perplexity=true", "eval.limit=4", "rl.kl.beta=0.1"]


def uncertain(found: dict[str, str]) -> dict[str, str]:
    """Without what measures the sampler, which is about the machine."""
    return {k: v for k, v in found.items() if not k.endswith("metrics.jsonl")}


@pytest.fixture(autouse=True)
def without_nohup() -> Iterator[None]:
    """These tests may be run under nohup, which has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("uncut")
    main([*WORDS, f"run.dir={folder / 'run'}"])
    return uncertain(fingerprint(folder))


PLACES: dict[str, tuple[Any, str, int, str]] = {
    # What is about to be called, and the how many-th time: what the line says.
    "data": (TaskData, "prepare", 1, "while preparing the data"),
    "evaluation": (gearshift.pipeline.heldout, "evaluate", 2, "while evaluating sft on validation"),
    "last step": (MasterAdamW, "step", 2, "after step 2 of 2 (sft)"),
    "export": (gearshift.pipeline.context, "save_model", 1, "while saving sft"),
    "reward": (gearshift.trainers.reward_model, "bradley_terry", 1, "after step 1 of 1 (reward)"),
    "rows": (gearshift.pipeline.stage_data, "load_rows", 2, "while preparing reward"),
    "step": (MasterAdamW, "step", 5, "after step 1 of 3 (rl)"),
    "checkpoint": (checkpoint, "save", 1, "after step 3 of 3 (rl)"),
    "gap": (gearshift.pipeline.stages, "logprob_gap", 1, "while measuring what rl has made"),
    "perplexity": (gearshift.pipeline.stages, "perplexity", 2, "while measuring what rl has made"),
    "report": (gearshift.pipeline.summary, "write_report", 1, "while writing the report"),
}
FAST = {"export"}


def asked_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, nth: int, number: int) -> None:
    """Have the signal arrive as this is called for the `nth` time."""
    original, calls = getattr(owner, name), []

    def asked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            signal.raise_signal(number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, asked)


@pytest.mark.parametrize(
    "place",
    [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in PLACES],
)
def test_asked_anywhere_it_stops_and_goes_on(
    place: str,
    uncut: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    owner, name, nth, said = PLACES[place]
    number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[list(PLACES).index(place) % 3]
    words = [*WORDS, f"run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        if place == "checkpoint":  # asked in the last step, and again as that is saved
            asked_at(patch, Stage, "log", 6, number)
        asked_at(patch, owner, name, nth, number)
        with pytest.raises(SystemExit) as ended:
            main(words)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 128 + number
    assert line.startswith("gearshift: Stopped ") and said in line and "same command" in line
    main(words)
    assert uncertain(fingerprint(tmp_path)) == uncut


REWARD = """
import os, time
from pathlib import Path

def hang(prompts, completions, **columns):
    at = Path(os.environ["HANGS"])
    n = len(at.read_text()) if at.exists() else 0
    at.write_text("x" * (n + 1))
    if os.environ.get("HANG_FROM") and n >= int(os.environ["HANG_FROM"]):
        Path(os.environ["HANGS"] + ".hung").touch()
        time.sleep(3600)
    return [float(len(c)) for c in completions]
"""


def started(folder: Path, words: list[str], **environ: str) -> subprocess.Popen[str]:
    """The command as a user starts it, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gearshift", "run", RECIPE, f"run.dir={folder / 'run'}", *words],
        env={**os.environ, "HANGS": str(folder / "calls"), **environ},
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip


def waited_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come so far"
        time.sleep(0.05)


def session_of(pid: int) -> list[str]:
    """The processes that still live in the session that this one began."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if rest[3] == str(pid) and rest[0] not in "ZX":
            found.append(path.parent.name)
    return found


@pytest.fixture(params=[0, 1], ids=["a thread", "a process"])
def hanging(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[str]]:
    (tmp_path / "hanging.py").write_text(REWARD)
    source = (
        f"rl.rewards=[{{source: '{tmp_path / 'hanging.py'}:hang', timeout: 3000, "
        f"processes: {request.param}}}]"
    )
    yield ["sft=null", "reward=null", "eval.limit=2", "rl.steps=4", "rl.rollout.prompts=1", source]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")
def test_the_second_ctrl_c_ends_a_step_that_hangs(tmp_path: Path, hanging: list[str]) -> None:
    process = started(tmp_path, hanging, HANG_FROM="2")
    waited_for((tmp_path / "calls.hung").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None, "the first waits for the step"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1] == (
        "gearshift: Stopped in step 3 of 4 (rl); the same command goes on after step 2 of 4."
    )
    waited_for(lambda: not session_of(process.pid), 20)
    again = started(tmp_path, hanging)
    assert again.communicate(timeout=300) and again.returncode == 0
    (tmp_path / "uncut").mkdir()
    straight = started(tmp_path / "uncut", hanging)
    assert straight.communicate(timeout=300) and straight.returncode == 0
    assert uncertain(fingerprint(tmp_path)) == uncertain(fingerprint(tmp_path / "uncut"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_under_nohup_a_terminal_that_closes_ends_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = started(tmp_path, ["reward=null", "sft=null", "rl.steps=6", "eval.limit=2"])
    finally:
        signal.signal(signal.SIGHUP, before)
    waited_for((tmp_path / "run" / "rl" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=300)
    assert process.returncode == 0
