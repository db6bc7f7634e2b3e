"""Whatever ends the program is one line on standard error and an exit code, never a traceback."""

import errno
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from gearshift.cli import main as cli
from gearshift.errors import DataError, InterruptedRunError, ModelError
from gearshift.runtime import exit_errors
from gearshift.runtime.allocator import short_of_memory
from gearshift.runtime.terminal import tolerate_lost_output
from gearshift.serve.api_error import ApiError

ENDS = {
    "the user's": (DataError("rows.jsonl, line 3\nis broken"), 1, "rows.jsonl, line 3 is broken"),
    "a signal": (InterruptedRunError("Stopped.", signal.SIGHUP), 128 + signal.SIGHUP, "Stopped."),
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped."),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "a/b.txt"), 1, "a/b.txt: No space left"),
    "no descriptor": (OSError(errno.EMFILE, "Too many open files"), 1, "ulimit -n"),
    "no process": (BlockingIOError(errno.EAGAIN, "Resource unavailable"), 1, "ulimit -u"),
    "no thread": (RuntimeError("can't start new thread"), 1, "No thread can be started"),
    "no memory": (MemoryError(), 1, "lower micro_batch_tokens"),
    "torch has none": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        1,
        "micro_batch_tokens",
    ),
    "too deep": (RecursionError("maximum depth"), 70, "RecursionError: maximum depth"),
    "anything": (KeyError("x\x1b[2J"), 70, r"x\x1b[2J' (the traceback is in"),
    "a closed pipe": (BrokenPipeError(), 141, ""),
}


@pytest.mark.parametrize("name", ENDS)
def test_one_line_and_a_code(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error, code, named = ENDS[name]

    def fail(arguments: object) -> None:
        arguments.folder_of_run = tmp_path  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(cli.tools, "keys", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main(["keys"])
    said = capsys.readouterr().err
    assert ended.value.code == code and named in said
    assert said.count("\n") == bool(named) and "Traceback" not in said
    kept = list(tmp_path.glob("traceback-*.txt"))
    assert len(kept) == (code == 70)
    if kept:
        assert "Traceback (most recent call last)" in kept[0].read_text()


def test_reading_the_words_may_fail_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "make_parser", lambda: 1 / 0)
    with pytest.raises(SystemExit, match="70"):
        cli.main(["keys"])
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_whose_memory_it_was() -> None:
    assert short_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"))
    assert short_of_memory(ModelError("The model cannot be loaded (can't allocate memory)"))
    assert not short_of_memory(DataError("the environment said: CUDA out of memory"))
    assert not short_of_memory(RuntimeError("shapes do not fit"))


class Full(io.StringIO):
    """As /dev/full is."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written_is_told_once_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", errors)
    with tolerate_lost_output():
        for _ in range(3):
            print("on", flush=True)
        print("told", file=sys.stderr)
    assert sys.stderr is errors
    assert errors.getvalue() == (
        "gearshift: standard output is lost (No space left on device); the run goes on.\ntold\n"
    )


PROGRAM = """
import atexit, multiprocessing, os, signal, sys, time
from gearshift.cli import main as cli
def passes_over(_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException:
        time.sleep(60)
def twice(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
        raise
def forks(_):
    here, there = multiprocessing.Pipe()
    def sleeps():
        there.send(None)
        time.sleep(60)
    child = multiprocessing.get_context("fork").Process(target=sleeps)
    child.start()
    here.recv()  # a signal that comes while it is forked is lost
    child.terminate()
    child.join()
    sys.exit(f"gearshift: {child.exitcode}")
def no_memory(_):
    atexit.register(lambda: 1 / 0)
    raise MemoryError
cli.tools.keys = globals()[sys.argv.pop()]
cli.main()
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("passes_over", 128 + signal.SIGTERM, "gearshift: stopped.\n"),
        ("twice", 128 + signal.SIGINT, "gearshift: stopped.\n"),
        ("forks", 1, f"gearshift: {-signal.SIGTERM}"),
        ("no_memory", 1, "gearshift: There is not enough memory"),
    ],
)
def test_a_program_leaves_with_one_line(how: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "keys", how], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == code and done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


@dataclass(frozen=True)
class FrozenError(Exception):
    code: str = "model_not_found"
    described: str = "mine"
    errno: str = "none"


@pytest.mark.parametrize("error", [FrozenError(), ApiError(404, "not_found", "there is no model")])
def test_what_an_error_calls_a_code_is_no_exit_code(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            exit_errors.exit_with_error(error, None, alone=False)
        assert left.value.code == (1 if isinstance(error, ApiError) else 70)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and lines[0].startswith("gearshift: ")


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_a_gpus_allocator_is_set_unless_the_user_did(
    given: dict[str, str], ours: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    cli.main(["keys", "run.seed"])
    assert os.environ.get("PYTORCH_ALLOC_CONF") == ours
