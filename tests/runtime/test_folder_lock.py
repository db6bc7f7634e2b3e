"""One process, and one thread of it, writes into a run's folder."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gearshift.errors import FolderInUseError
from gearshift.runtime import folder_lock
from gearshift.runtime.folder_lock import FALLBACK_LOCK_FILE, LOCK_FILE, LockHolder, lock_run_folder

HOLD = """
import errno, fcntl, os, sys, time
from pathlib import Path
from gearshift.errors import FolderInUseError
from gearshift.runtime.folder_lock import lock_run_folder

def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "without locks":
    fcntl.flock = refuse
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock_run_folder(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except FolderInUseError as error:
    print(error, flush=True)
"""
KINDS = ["with locks", "without locks"]


def start(folder: Path, kind: str) -> "subprocess.Popen[str]":
    """A process that takes the lock when a line arrives."""
    words = [sys.executable, "-c", HOLD, str(folder), kind]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert answer_of(process) == "ready"
    return process


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def answer_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without locks":
        monkeypatch.setattr(folder_lock.fcntl, "flock", refuse(errno.ENOLCK))
    return str(request.param)


def refuse(number: int) -> Callable[..., None]:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


def test_of_eight_that_start_at_once_one_has_it(tmp_path: Path, kind: str) -> None:
    gone = {"host": socket.gethostname(), "pid": 2**22, "since": "then", "started": "before"}
    for name in (LOCK_FILE, FALLBACK_LOCK_FILE):
        (tmp_path / name).write_text(json.dumps(gone))
    starters = [start(tmp_path, kind) for _ in range(8)]
    for starter in starters:
        go(starter)
    answers = [answer_of(starter) for starter in starters]
    assert answers.count("held") == 1
    winner = starters[answers.index("held")]
    who = rf"is in use by process {winner.pid} on {re.escape(socket.gethostname())} since \d{{4}}-"
    assert all(re.search(who, answer) for answer in answers if answer != "held"), answers
    with pytest.raises(FolderInUseError, match="wait for it, stop it, or choose another"):
        lock_run_folder(tmp_path).__enter__()
    winner.kill()
    winner.wait()
    with lock_run_folder(tmp_path):
        pass
    for starter in starters:
        starter.communicate()


def test_two_threads_of_one_process(tmp_path: Path, kind: str) -> None:
    refusals: list[str] = []

    def other() -> None:
        try:
            with lock_run_folder(tmp_path):
                refusals.append("none")
        except FolderInUseError as error:
            refusals.append(str(error))

    (tmp_path / "link").symlink_to(tmp_path / "run")
    for folder in (tmp_path, tmp_path / "run"):
        with lock_run_folder(folder):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    assert "in use by this process since" in refusals[0] and refusals[1] == "none"
    with (
        lock_run_folder(tmp_path / "run"),
        pytest.raises(FolderInUseError),
        lock_run_folder(tmp_path / "link"),
    ):
        pass
    with lock_run_folder(tmp_path):  # it was given back
        pass


@pytest.mark.parametrize("text", [b"", b"{", b"\0" * 64, b"[]", b'{"host": 3}', b"\xff\xfe"])
def test_a_torn_lock_file_ends_no_run(
    tmp_path: Path, kind: str, text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_WAIT", 0.001)
    (tmp_path / LOCK_FILE).write_bytes(text)
    (tmp_path / FALLBACK_LOCK_FILE).write_bytes(text)
    with lock_run_folder(tmp_path):
        pass


def test_without_locks_a_process_of_another_machine_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse(errno.EOPNOTSUPP))
    other = LockHolder("else\x1bwhere", os.getpid(), "yesterday", "then")
    (tmp_path / FALLBACK_LOCK_FILE).write_bytes(other.text())
    with pytest.raises(FolderInUseError, match=r"on else\\x1bwhere .* delete .*run.lock.held"):
        lock_run_folder(tmp_path).__enter__()
    reused = LockHolder(socket.gethostname(), os.getpid(), "yesterday", "before the restart")
    (tmp_path / FALLBACK_LOCK_FILE).write_bytes(reused.text())
    with lock_run_folder(tmp_path):
        assert LockHolder.read((tmp_path / FALLBACK_LOCK_FILE).read_bytes()) != reused
    assert not (tmp_path / FALLBACK_LOCK_FILE).exists()


def test_a_fork_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    go_on, end = os.pipe()
    parent = os.fork()
    if parent == 0:
        with lock_run_folder(tmp_path):
            if os.fork() == 0:
                os.close(end)
                os.read(go_on, 1)  # until the test closes its end
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(go_on)
    assert os.WTERMSIG(os.waitpid(parent, 0)[1]) == signal.SIGKILL
    with lock_run_folder(tmp_path):
        pass
    os.close(end)


def test_a_fork_that_ends_in_the_with_block_takes_nothing_away(tmp_path: Path, kind: str) -> None:
    with lock_run_folder(tmp_path):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            with pytest.raises(FolderInUseError):
                lock_run_folder(tmp_path).__enter__()
    if not child:
        os._exit(0)
