"""Runs a program that may be malicious, in a sandbox. bubblewrap gives it namespaces of its own (no
network, no other process, no file except Python's own, nothing writable); a system-call filter
forbids a second process and sockets; limits bound time and memory.

Only this file and `seccomp` confine a program, and no key switches them off: without a sandbox, no
program runs. They know programs and what they print; they must not import rewards.
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
    """What one program may use. It is one process that writes no files; its threads run one after
    the other, each where it is started.
    """

    seconds: float = 5.0
    """Processor seconds, rounded up. The limit by the clock is three times as long, because
    training uses the processor too.
    """
    memory_mib: int = 512
    """Address space, in MiB."""
    output_kib: int = 256
    """How much it may print to standard output, and to standard error, in KiB."""
    files: int = 32
    """How many files it may have open at the same time."""

    def end(self) -> float:
        """The time at which a program that starts now must have ended, by `time.monotonic`."""
        return time.monotonic() + 3 * self.seconds


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it printed to standard output."""

    status: Status
    """`ok`; `error` (an exception, a signal, or an exit code other than 0); `timeout`; `output` (it
    printed too much); `unusable` (no program could pass these tests).
    """
    stdout: str = ""
    why: str = ""
    """Why the tests are unusable."""


class SandboxFailedError(Exception):
    """The sandbox did not start this time, so nothing is known about the program."""


def run_sandboxed(code: str, stdin: str = "", limits: SandboxLimits = SandboxLimits()) -> Outcome:
    """Run a Python program.

    Raises `ConfigError` where there is no sandbox, and `SandboxFailedError` if it failed only this
    time.
    """
    _check_sandbox_works()
    return _run(code, stdin, limits)


def check_sandboxed(
    code: str, tests: str, limits: SandboxLimits = SandboxLimits(), entry_point: str = ""
) -> Outcome:
    """Run tests (`assert f(2) == 4`; any statements; unittest's and pytest's forms) on a program.

    Tests and program are in two sandboxes. A name that the tests use and do not define is requested
    from the program's sandbox, and plain data crosses. So the program sees its arguments, but
    neither the expected value nor the comparison. `entry_point` is the argument of
    `check(candidate)` if the tests do not call it. It raises what `run_sandboxed` raises.
    """
    _check_sandbox_works()
    with ExitStack() as stack:
        ask_read, ask_write = _open_pipe(stack)
        answer_read, answer_write = _open_pipe(stack)
        program = stack.enter_context(
            _SandboxProcess("serve", {PROGRAM: code}, ask_read, answer_write, limits)
        )
        # There may be many tests. The limit by the clock stays the same.
        long = replace(limits, seconds=3 * limits.seconds)
        tester = stack.enter_context(
            _SandboxProcess("check", {TESTS: tests}, answer_read, ask_write, long, entry_point)
        )
        for end in (ask_read, ask_write, answer_read, answer_write):
            end.close()
        if not tester.wait(limits.end()):
            return Outcome("timeout")
        if tester.exit_code is None:
            raise SandboxFailedError(tester.last_error_line())
        if tester.exit_code == UNUSABLE:
            return Outcome("unusable", why=tester.last_error_line())
        if tester.exit_code == PASSED:
            return Outcome("ok")
        if program.wait(time.monotonic() + 0.5) and program.exit_code is None:
            raise SandboxFailedError(program.last_error_line())
        return Outcome("error")


def _run(code: str, stdin: str, limits: SandboxLimits) -> Outcome:
    with TemporaryFile() as given, TemporaryFile() as out:
        given.write(stdin.encode("utf-8", "replace"))
        given.seek(0)
        with _SandboxProcess("run", {PROGRAM: code}, given, out, limits) as box:
            in_time = box.wait(limits.end())
            if in_time and box.exit_code is None:
                raise SandboxFailedError(box.last_error_line())
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
    """One process under bubblewrap. The end of the context ends it and all processes in it."""

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
        self._status = b""
        self._stderr = TemporaryFile()  # noqa: SIM115 - closed on leaving
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
                    stderr=self._stderr,
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
        """Whether the process ends before this time: bubblewrap closes its status pipe then."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        while (left := until - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                read = os.read(self._read, 4096)
                if not read:
                    return True
                self._status += read
        return False

    @property
    def exit_code(self) -> int | None:
        """The program's exit code; None if bubblewrap did not start it, or it has not ended."""
        words = [json.loads(line) for line in self._status.decode().splitlines()]
        return next((word["exit-code"] for word in words if "exit-code" in word), None)

    def last_error_line(self) -> str:
        """The last line that the process wrote to standard error."""
        self._stderr.seek(0)
        lines = self._stderr.read(10_000).decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it printed no error"

    def __enter__(self) -> _SandboxProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # --die-with-parent: its own processes end with it
        self._process.wait()
        os.close(self._read)
        self._stderr.close()


def _bwrap_arguments() -> Sequence[str]:
    """bubblewrap's arguments: new namespaces of every kind, and only the files that Python
    needs.
    """
    prefix = os.path.realpath(sys.base_prefix)
    arguments = [
        "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
        "--unshare-cgroup-try", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox",
        "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv",
    ]  # fmt: skip
    for place in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if os.path.islink(place):
            arguments += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            arguments += ["--ro-bind", place, place]
    python = _python_path() if prefix in ("/", "/usr") else prefix
    child = str(Path(sandbox_child.__file__).resolve().parent)
    arguments += ["--dev-bind", "/dev/null", "/dev/null"]  # many programs write to it
    arguments += ["--ro-bind", python, python, "--ro-bind", child, _CHILD_PATH]
    return [*arguments, "--chdir", "/"]


def _limit_arguments(limits: SandboxLimits) -> list[str]:
    kib = 1024
    return [
        str(math.ceil(limits.seconds)),
        str(limits.memory_mib * kib * kib),
        str(limits.output_kib * kib),
        str(limits.files),
    ]


def _readable(stack: ExitStack, content: bytes) -> int:
    """A file descriptor from which `content` can be read."""
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
    """The path of the interpreter itself, outside any virtual environment."""
    return os.path.realpath(sys.executable)


@cache
def _bwrap_path() -> Path:
    """The path of the system's bubblewrap."""
    if found := shutil.which("bwrap"):
        return Path(found)
    raise ConfigError(
        "Rewards that run code need bubblewrap, which isolates the code; install it with `apt "
        "install bubblewrap`, or the package of your system."
    )


@cache
def _check_sandbox_works() -> None:
    """Raises `ConfigError` if no sandbox can start on this machine."""
    # Compile once: a sandbox can write nothing, so each one would compile these files again.
    compileall.compile_dir(os.path.dirname(sandbox_child.__file__), quiet=2, optimize=0)
    try:
        outcome = _run("print(6 * 7)", "", SandboxLimits(seconds=30))
        reason = f"its status is {outcome.status}"
    except (SandboxFailedError, OSError) as error:
        outcome, reason = None, str(error)
    if outcome != Outcome("ok", "42\n"):
        raise ConfigError(
            f"The sandbox for code does not start ({reason}); bubblewrap needs a Linux that allows"
            " user namespaces, so in a container give the container a seccomp profile with them."
        )
