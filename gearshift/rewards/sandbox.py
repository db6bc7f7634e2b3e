"""A program that nobody trusts, run where it can reach nothing: bubblewrap's namespaces (no
network, no process of the host, no file but Python's own, nothing writable), a system-call filter
(no second process, no socket), and limits. It knows programs and what they print, no reward.

What keeps a program in stands in this one file and is never optional: where no sandbox can be had,
nothing runs.
"""

from __future__ import annotations

import compileall
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal

from gearshift.errors import ConfigError
from gearshift.rewards import sandbox_child
from gearshift.rewards.sandbox_child import PASSED, PROGRAM, TESTS, UNUSABLE
from gearshift.rewards.seccomp import seccomp_filter

Status = Literal["ok", "error", "timeout", "output", "unusable"]
_CHILD_PATH = "/box/gearshift/rewards/sandbox_child"
_START_CHILD = """
import sys
sys.path.insert(0, "/box")
from gearshift.rewards.sandbox_child.main import main
main()
"""
_OUT_OF_TIME = (128 + signal.SIGKILL, 128 + signal.SIGXCPU)


@dataclass(frozen=True)
class SandboxLimits:
    """What one program may use. It is one process, whose threads run one after the other where they
    are started, and writes no files.
    """

    seconds: float = 5.0
    """Of the processor, rounded up; by the clock three times as long, since training shares it."""
    memory_mib: int = 512
    """Address space."""
    output_kib: int = 256
    """Printed, on each of standard output and error."""
    files: int = 32
    """Open at a time."""

    def end(self) -> float:
        """When a program that starts now has to be over, by `time.monotonic`."""
        return time.monotonic() + 3 * self.seconds


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it printed."""

    status: Status
    """`ok`; `error` (an exception, a signal, an exit code other than 0); `timeout`; `output` (it
    printed too much); `unusable` (the tests cannot be put to any program).
    """
    stdout: str = ""
    why: str = ""
    """The tests are unusable."""


class SandboxFailedError(Exception):
    """The sandbox did not come up this time: nothing is known of the program."""


def run_sandboxed(code: str, stdin: str = "", limits: SandboxLimits = SandboxLimits()) -> Outcome:
    """Run a Python program.

    Raises `ConfigError` where there is no sandbox, `LostError` if it failed this once.
    """
    _check_sandbox_works()
    return _run(code, stdin, limits)


def check_sandboxed(
    code: str, tests: str, limits: SandboxLimits = SandboxLimits(), entry_point: str = ""
) -> Outcome:
    """Run tests (`assert f(2) == 4`; any statements, unittest's and pytest's forms) on a program.

    Tests and program are in two sandboxes: a name that the tests use and nobody defined is asked
    for across, by plain data, so the program sees its arguments and never what is expected, nor
    what compares. `entry_point`: what `check(candidate)` is called with, if the tests do not call
    it. Raises like `run_sandboxed`.
    """
    _check_sandbox_works()
    with ExitStack() as stack:
        ask_read, ask_write = _open_pipe(stack)
        answer_read, answer_write = _open_pipe(stack)
        program = stack.enter_context(
            _SandboxProcess("serve", {PROGRAM: code}, ask_read, answer_write, limits)
        )
        long = replace(limits, seconds=3 * limits.seconds)  # tests may be many; the clock is one
        tester = stack.enter_context(
            _SandboxProcess("check", {TESTS: tests}, answer_read, ask_write, long, entry_point)
        )
        for end in (ask_read, ask_write, answer_read, answer_write):
            end.close()
        if not tester.wait(limits.end()):
            return Outcome("timeout")
        if tester.exit_code is None:
            raise SandboxFailedError(tester.said())
        if tester.exit_code == UNUSABLE:
            return Outcome("unusable", why=tester.said())
        if tester.exit_code == PASSED:
            return Outcome("ok")
        if program.wait(time.monotonic() + 0.5) and program.exit_code is None:
            raise SandboxFailedError(program.said())
        return Outcome("error")


def _run(code: str, stdin: str, limits: SandboxLimits) -> Outcome:
    with TemporaryFile() as given, TemporaryFile() as out:
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        with _SandboxProcess("run", {PROGRAM: code}, given, out, limits) as box:
            in_time = box.wait(limits.end())
            if in_time and box.exit_code is None:
                raise SandboxFailedError(box.said())
        most = limits.output_kib * 1024
        size = out.seek(0, os.SEEK_END)
        out.seek(0)
        stdout = out.read(most).decode("utf-8", "surrogateescape")
    if not in_time or box.exit_code in _OUT_OF_TIME:
        return Outcome("timeout", stdout)
    if size >= most:
        return Outcome("output", stdout)
    return Outcome("error" if box.exit_code else "ok", stdout)


class _SandboxProcess:
    """One process under bubblewrap. Leaving the context ends it, and all that it holds."""

    def __init__(
        self,
        role: Literal["run", "serve", "check"],
        files: Mapping[str, str],
        stdin: IO[bytes],
        stdout: IO[bytes],
        limits: SandboxLimits,
        *more: str,
    ) -> None:
        self._read, write = os.pipe()
        self._told = b""
        self._noise = TemporaryFile()  # noqa: SIM115 - closed on leaving
        with ExitStack() as stack:
            filter_fd = _readable(stack, seccomp_filter())
            contents = {
                _readable(stack, text.encode("utf-8", "replace")): path
                for path, text in files.items()
            }
            bound = [w for fd, p in contents.items() for w in ("--ro-bind-data", str(fd), p)]
            command = [
                str(_bwrap_path()), *_bwrap_arguments(), *bound, "--remount-ro", "/",
                "--seccomp", str(filter_fd), "--json-status-fd", str(write),
                "--", _python_path(), "-I", "-S", "-B", "-X", "utf8", "-c", _START_CHILD,
                role, *_limit_arguments(limits), *more,
            ]  # fmt: skip
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=self._noise,
                    pass_fds=(filter_fd, write, *contents),
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                os.close(self._read)
                raise
            finally:
                os.close(write)

    def wait(self, until: float) -> bool:
        """Whether it ended by then: bubblewrap holds its status pipe open until its own end."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                read = os.read(self._read, 4096)
                if not read:
                    return True
                self._told += read
        return False

    @property
    def exit_code(self) -> int | None:
        """The program's; None if it never began (bubblewrap failed) or has not ended."""
        words = [json.loads(line) for line in self._told.decode().splitlines()]
        return next((word["exit-code"] for word in words if "exit-code" in word), None)

    def said(self) -> str:
        """The last line on standard error."""
        self._noise.seek(0)
        lines = self._noise.read(10_000).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "no word"

    def __enter__(self) -> _SandboxProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # what it started dies with it: --die-with-parent
        self._process.wait()
        os.close(self._read)
        self._noise.close()


def _bwrap_arguments() -> Sequence[str]:
    """bubblewrap's arguments: new namespaces of every kind, and of files only what Python needs."""
    prefix = os.path.realpath(sys.base_prefix)
    walls = [
        "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox",
        "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv",
    ]  # fmt: skip
    for place in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(place):
            walls += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            walls += ["--ro-bind", place, place]
    own = _python_path() if prefix in ("/", "/usr") else prefix
    ours = str(Path(sandbox_child.__file__).resolve().parent)
    walls += ["--dev-bind", "/dev/null", "/dev/null"]  # where programs send what they print
    return [*walls, "--ro-bind", own, own, "--ro-bind", ours, _CHILD_PATH, "--chdir", "/"]


def _limit_arguments(limits: SandboxLimits) -> list[str]:
    kib = 1024
    return [
        str(math.ceil(limits.seconds)),
        str(limits.memory_mib * kib * kib),
        str(limits.output_kib * kib),
        str(limits.files),
    ]


def _readable(stack: ExitStack, content: bytes) -> int:
    """A descriptor to read `content` from."""
    file = stack.enter_context(TemporaryFile())  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file.fileno()


def _open_pipe(stack: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return (
        stack.enter_context(os.fdopen(read, "rb", 0)),
        stack.enter_context(os.fdopen(write, "wb", 0)),
    )


def _python_path() -> str:
    """The interpreter itself, outside any virtual environment."""
    return os.path.realpath(sys.executable)


@cache
def _bwrap_path() -> Path:
    """bubblewrap, the system's."""
    if found := shutil.which("bwrap"):
        return Path(found)
    raise ConfigError(
        "Rewards that run code need bubblewrap, which keeps the code in; install it: "
        "apt install bubblewrap, or your system's like."
    )


@cache
def _check_sandbox_works() -> None:
    """Raises `ConfigError` if this machine lets no sandbox come up."""
    # Nothing is written inside a sandbox, so each would compile what runs there anew.
    compileall.compile_dir(os.path.dirname(sandbox_child.__file__), quiet=2, optimize=0)
    try:
        outcome = _run("print(6 * 7)", "", SandboxLimits(seconds=30))
        said = f"it gave {outcome.status}"
    except (SandboxFailedError, OSError) as error:
        outcome, said = None, str(error)
    if outcome != Outcome("ok", "42\n"):
        raise ConfigError(
            f"The sandbox for code does not start ({said}); bubblewrap needs a Linux that allows"
            " user namespaces (in a container: run it with its own seccomp profile)."
        )
